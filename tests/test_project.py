"""What holds for the project as a whole: who imports whom, versions that fit, recipes that load."""

import ast
import subprocess
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.utils import is_kernels_available

from eval_harness.config import EvalConfig
from sft.config import SftStageConfig
from trainer.cli import parse_recipe
from trainer.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_motif2", "kernels_hub", "trainer", "sft", "eval_harness")
ENTRIES = ("trainer.pretrain", "sft.train", "eval_harness.run")
SOURCES = [path for name in (*PACKAGES, "recipes", "benchmarks") for path in (ROOT / name).rglob("*.py")]


def imported_modules(path: Path) -> set[str]:
    """Absolute names that a file imports, `from a import b` as both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", ["modeling_motif2", "kernels_hub"])
def test_uploaded_packages_import_nothing_of_ours(package):
    others = set(PACKAGES) - {package}
    files = [path for path in (ROOT / package).rglob("*.py") if not {"tests", "benchmarks"} & set(path.parts)]
    assert files
    for path in files:
        assert not {name.split(".")[0] for name in imported_modules(path)} & others, path


def test_nothing_imports_an_entry_script():
    assert len(SOURCES) > 50
    for path in SOURCES:
        assert not imported_modules(path) & set(ENTRIES), path


def test_no_environment_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", ".venv"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout == ""


def test_kernels_and_transformers_fit_each_other():
    assert is_kernels_available(), "transformers would ignore every kernel in silence: see CONTRIBUTING.md"


def test_pins_are_exact_and_installed():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {canonicalize_name(name): pinned for name, pinned in pins.items()}
    for requirement in map(Requirement, requires("motif2")):
        if requirement.marker is None or requirement.marker.evaluate({"extra": "test"}):
            installed = version(requirement.name).split("+")[0]
            assert installed == pins[canonicalize_name(requirement.name)], f"{requirement.name}: make a new .venv"


def test_every_recipe_is_a_mapping_that_says_what_it_needs():
    paths = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(paths) > 20
    for path in paths:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
        assert path.read_text().startswith("#"), f"{path} has no header: hardware, time, launch line"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_evaluation_recipe_gives_a_configuration(path):
    argv = ["--config", str(path), "--model", "model", "--output", "runs/eval"]
    (config,) = parse_recipe(EvalConfig, description="", argv=argv)
    assert config.suite in ("base", "instruct")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "demo").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_demo_recipe_gives_a_configuration(path):
    config_class = PretrainConfig if path.stem == "pretrain" else SftStageConfig
    (config,) = parse_recipe(config_class, description="", argv=["--config", str(path)])
    assert config.output_dir == f"runs/demo/{path.stem}"
