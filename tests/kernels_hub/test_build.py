"""Built variants of the kernel repositories: up to date, valid metadata, loaded through `kernels` as users do."""

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import kernels_data
import pytest
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping

from kernels_hub import build
from modeling_motif2 import Motif2PolyNormMul

REPOSITORIES = sorted(path.parent for path in build.ROOT.glob("*/build.toml"))
POLYNORM = build.ROOT / "polynorm"


@pytest.mark.parametrize("repository", REPOSITORIES, ids=lambda path: path.name)
def test_the_stored_build_is_what_the_sources_give(repository):
    assert build.differences(repository) == []


@pytest.mark.parametrize("variant", sorted(build.ROOT.glob("*/build/*")), ids=lambda path: "-".join(path.parts[-3::2]))
def test_metadata_is_valid(variant):
    metadata = kernels_data.Metadata.read_from_file(variant / "metadata.json")
    assert f"torch-{metadata.backend.backend_type}".lower() == variant.name
    metadata.digest.validate(kernels_data.Digest.hash_variant(metadata.digest.algorithm, variant))
    operators = (variant / "_ops.py").read_text()
    assert f"torch.ops.{metadata.id}" in operators


def test_a_change_of_the_sources_changes_the_namespace(tmp_path):
    package = POLYNORM / "torch-ext" / "polynorm"
    before = build.source_hash(package)
    (tmp_path / "polynorm").mkdir()
    for path in package.glob("*.py"):
        (tmp_path / "polynorm" / path.name).write_text(path.read_text())
    assert build.source_hash(tmp_path / "polynorm") == before
    (tmp_path / "polynorm" / "ops.py").write_text("x = 1\n")
    assert build.source_hash(tmp_path / "polynorm") != before


def test_the_digest_holds_every_file():
    variant = POLYNORM / "build" / "torch-cpu"
    files = kernels_data.Metadata.read_from_file(variant / "metadata.json").digest.files
    assert set(files) >= {"__init__.py", "_ops.py", "layers.py", "polynorm/__init__.py"}
    assert (
        files["layers.py"] == base64.b64encode(hashlib.sha256((variant / "layers.py").read_bytes()).digest()).decode()
    )


def test_kernels_loads_a_variant_and_maps_its_layer():
    kernel = get_local_kernel(POLYNORM, backend="cpu")
    layer = Motif2PolyNormMul()
    x, up = torch.randn(2, 24), torch.randn(2, 24)
    want = layer(x, up)
    repository = LocalLayerRepository(POLYNORM, layer_name="FusedMulPolyNorm")
    with use_kernel_mapping({"FusedMulPolyNorm": {"cpu": repository}}, inherit_mapping=False):
        kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert layer.forward.__func__ is kernel.layers.FusedMulPolyNorm.forward
    torch.testing.assert_close(layer(x, up), want)


@pytest.mark.parametrize(
    "load",
    [
        "from kernels import get_kernel; k = get_kernel('motif2/polynorm', revision='main')",
        "import sys; sys.path.insert(0, '{build}/torch-cpu'); import polynorm as k",
    ],
    ids=["LOCAL_KERNELS", "folder on the path"],
)
@pytest.mark.slow
def test_other_ways_to_load(load):
    code = load.format(build=POLYNORM / "build") + "; import torch; print(k.poly_norm(*map(torch.ones, (3, 3, 1))))"
    environment = os.environ | {"LOCAL_KERNELS": f"motif2/polynorm={POLYNORM}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path("/"))
    assert "tensor([4.0000, 4.0000, 4.0000])" in run.stdout, run.stderr


def test_a_compiled_kernel_is_refused(tmp_path):
    (tmp_path / "build.toml").write_text('[general]\nname = "x"\nedition = 4\nbackends = ["cuda"]\n[torch]\n')
    with pytest.raises(ValueError, match="compiles nothing"):
        build.build(tmp_path, tmp_path / "build")
