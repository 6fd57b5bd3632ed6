"""Generates the built variants of a kernel repository: `python kernels_hub/build.py polynorm` (or `--check`).

A kernel in Triton and Python needs no compiler: a variant is the package under `torch-ext` laid out flat, a generated
`_ops.py` that gives its operators a namespace of their own, `metadata.json`, and a folder with the package's name for
loaders that look for one. The namespace carries a hash of the sources: several versions can live in one process.
"""

import argparse
import base64
import filecmp
import hashlib
import json
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent

OPS = '''"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"{namespace}::{{op_name}}"
'''

COMPATIBILITY = '''"""The package one folder up under its own name, for loaders that look for a folder (generated)."""

import importlib.util
import sys
from pathlib import Path

if "{namespace}" not in sys.modules:
    _file = Path(__file__).resolve().parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location("{namespace}", _file)
    sys.modules["{namespace}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{namespace}"])
globals().update({{key: value for key, value in vars(sys.modules["{namespace}"]).items() if key[:2] != "__"}})
'''


def _read_settings(repository: Path) -> dict:
    settings = tomllib.loads((repository / "build.toml").read_text())
    general = settings["general"]
    if general["edition"] != 5 or "torch-noarch" not in settings:
        raise ValueError(
            f"{repository}/build.toml must have edition 5 and [torch-noarch]: this script compiles nothing"
        )
    return general


def _sources(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)


def source_hash(package: Path) -> str:
    """Seven hexadecimal digits that change with any source file of `package`."""
    digest = hashlib.sha256()
    for path in _sources(package):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:7]


def _digest(variant: Path) -> dict:
    """Hash of every file of a variant, in the form in which `kernels` signs and checks them."""
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in _sources(variant)
    }
    return {"algorithm": "sha256", "files": files}


def build(repository: Path, output: Path) -> list[Path]:
    """Writes one folder a backend of `repository` under `output`, replacing what is there.

    Args:
        repository: folder of `build.toml` and `torch-ext/<name>/`.
        output: folder of the variants, usually `repository / "build"`.

    Returns:
        list[Path]: the variants written, `torch-cuda`, `torch-rocm`, `torch-cpu`.

    Raises:
        ValueError: `build.toml` asks for a compiled kernel.
    """
    general = _read_settings(repository)
    name = general["name"].replace("-", "_")
    package = repository / "torch-ext" / name
    variants = []
    for backend in general["backends"]:
        variant = output / f"torch-{backend}"
        namespace = f"_{name}_{backend}_{source_hash(package)}"
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(package, variant, ignore=shutil.ignore_patterns("__pycache__"))
        (variant / "_ops.py").write_text(OPS.format(namespace=namespace))
        (variant / name).mkdir()
        (variant / name / "__init__.py").write_text(COMPATIBILITY.format(namespace=namespace))
        metadata = {
            "name": general["name"],
            "id": namespace,
            "version": general["version"],
            "license": general["license"],
            "python-depends": general.get("python-depends", []),
            "backend": {"type": backend},
            "digest": _digest(variant),
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def differences(repository: Path) -> list[str]:
    """Files of `repository / "build"` that are not what its sources would give now."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        build(repository, fresh)
        stored = repository / "build"
        names = {
            path.relative_to(root).as_posix()
            for root in (fresh, stored)
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        _, changed, missing = filecmp.cmpfiles(fresh, stored, sorted(names), shallow=False)
        return sorted(changed + missing)


def main(argv: list[str] | None = None) -> None:
    """Builds the named repositories, or with `--check` fails if a stored build is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="+", help="folders beside this script, such as polynorm")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the build is out of date")
    arguments = parser.parse_args(argv)
    stale = []
    for kernel in arguments.kernels:
        repository = ROOT / kernel
        if arguments.check:
            stale += [f"{kernel}/build/{name}" for name in differences(repository)]
        else:
            print(*build(repository, repository / "build"), sep="\n")
    if stale:
        sys.exit("out of date, run without --check:\n" + "\n".join(stale))


if __name__ == "__main__":
    main()
