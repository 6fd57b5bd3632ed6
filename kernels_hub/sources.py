"""Where a PolyNorm layer can come from: the official repository, ours on the Hub, or ours in this checkout.

Every source gives a layer class in the sense of the `kernels` library: a module without a constructor whose `forward`
reads `weight`, `bias` and `eps` of the module it is put into.
"""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

CHECKOUT = Path(__file__).resolve().parent
REPOSITORIES = {"official": "Motif-Technologies/activation", "hub": "motif2/polynorm"}


class KernelUnavailable(RuntimeError):
    """A source cannot give a kernel here; the message says why."""


class NotLocked(ValueError):
    """A lock file was given that says nothing about this source."""


@dataclass(frozen=True)
class Layers:
    """Layer classes of one loaded kernel, by the name under which `kernels` maps them.

    Args:
        namespace: name of the kernel's module and of its operators' namespace.
        classes: layer classes by layer name.
        module: the loaded package.
    """

    namespace: str
    classes: dict[str, type[nn.Module]]
    module: ModuleType


def backend() -> str:
    """The backend whose variant fits this process: "cuda", "rocm" or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def load_local(name: str) -> ModuleType:
    """The kernel package `name` of this checkout, built for the present backend; `kernels` need not be installed.

    Raises:
        KernelUnavailable: there is no built variant for the backend, or it cannot be imported.
    """
    variant = CHECKOUT / name / "build" / f"torch-{backend()}"
    if not (variant / "metadata.json").is_file():
        raise KernelUnavailable(f"{variant} does not exist: run python kernels_hub/build.py {name}")
    try:
        namespace = json.loads((variant / "metadata.json").read_text())["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise KernelUnavailable(
            f"{variant}/metadata.json is damaged: run python kernels_hub/build.py {name}"
        ) from error
    if namespace in sys.modules:
        return sys.modules[namespace]
    try:
        if is_kernels_available():
            from kernels import get_local_kernel

            return get_local_kernel(CHECKOUT / name, backend=backend() if backend() == "cpu" else None)
        spec = importlib.util.spec_from_file_location(namespace, variant / "__init__.py")
        sys.modules[namespace] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(namespace, None)  # else the next call would take the half of it that was imported
        raise KernelUnavailable(f"{variant} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _locked_revision(repository: str, lockfile: Path) -> tuple[str, dict]:
    """Commit and variant hashes of `repository` in a file that `kernels lock` wrote."""
    from kernels.lockfile import KernelLock

    if not lockfile.is_file():
        raise ValueError(f"the lock file {lockfile} does not exist: run kernels lock, or give no lock file")
    for entry in json.loads(lockfile.read_text()):
        lock = KernelLock.from_json(entry)
        if lock.repo_id == repository:
            return lock.sha, lock.variants
    raise NotLocked(f"{lockfile} does not lock {repository}: add it to [tool.kernels.dependencies], run kernels lock")


def _check_lock(variant: Path, locks: dict, repository: str) -> None:
    """Compares the files of a downloaded variant with the hash that is locked."""
    from kernels.utils import validate_kernel

    if variant.name not in locks:
        raise ValueError(
            f"the lock of {repository} has no {variant.name}, only {sorted(locks)}: run kernels lock again"
        )
    validate_kernel(repo_path=variant.parents[1], variant=variant.name, hash=locks[variant.name].hash)


def load_remote(repository: str, revision: str | None, lockfile: Path | None, trust_remote_code: bool) -> ModuleType:
    """The kernel package of a repository on the Hub, at a lock file's commit where one is given.

    Raises:
        KernelUnavailable: it cannot be had here.
        NotLocked: the lock file does not name the repository.
        ValueError: there is no such lock file, the files do not have the locked hashes, or `LOCAL_KERNELS` replaces
            what is locked.
    """
    if not is_kernels_available():
        found = importlib.util.find_spec("kernels") and importlib.import_module("kernels").__version__
        raise KernelUnavailable(
            f"the package kernels is {found if found else 'not installed'}; transformers needs "
            f">={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
        )
    from kernels import get_kernel
    from kernels.utils import install_kernel

    overridden = f"{repository}=" in os.environ.get("LOCAL_KERNELS", "")
    if lockfile and overridden:
        raise ValueError(f"LOCAL_KERNELS puts a folder in the place of {repository}, which no lock covers: unset one")
    revision, locks = _locked_revision(repository, lockfile) if lockfile else (revision or "v1", None)
    try:
        variant = None if overridden else install_kernel(repository, revision=revision)
    except Exception as error:
        raise KernelUnavailable(f"{type(error).__name__}: {error}") from error
    if locks is not None:
        _check_lock(variant, locks, repository)
    try:
        if variant is not None:
            namespace = json.loads((variant / "metadata.json").read_text())["id"]
            if namespace in sys.modules:  # the same sources, from a checkout say: operators register only once
                return sys.modules[namespace]
        return get_kernel(repository, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise KernelUnavailable(f"{type(error).__name__}: {error}") from error


def load_layers(
    source: str,
    names: set[str],
    *,
    revision: str | None = None,
    lockfile: Path | None = None,
    trust_remote_code: bool = False,
) -> Layers:
    """Loads the layers `names` from a source.

    Args:
        source: "official", "hub" or "local".
        names: layer names, of "PolyNorm" and "FusedMulPolyNorm".
        revision: commit, tag or branch on the Hub; its version 1 (branch v1) if None and nothing is locked.
        lockfile: file written by `kernels lock`; its commit is loaded, and the files must have the hashes in it.
        trust_remote_code: load from a publisher whom the Hub does not list as trusted.

    Returns:
        Layers: the classes and their package.

    Raises:
        KernelUnavailable: the source cannot give these layers here.
        NotLocked: the lock file does not name the repository, or the source is this checkout, which none covers.
        ValueError: there is no such lock file, the files do not have the locked hashes, or `LOCAL_KERNELS` replaces
            what is locked.
    """
    if source != "official" and backend() != "cpu" and importlib.util.find_spec("triton") is None:
        raise KernelUnavailable("its kernels need Triton on a GPU: install triton")
    if source == "local" and lockfile is not None:
        raise NotLocked(f"{lockfile} locks what comes from the Hub, not this checkout: give no lock file, or hub")
    if source == "local":
        module = load_local("polynorm")
    else:
        module = load_remote(REPOSITORIES[source], revision, lockfile, trust_remote_code)
    missing = [name for name in sorted(names) if not hasattr(module.layers, name)]
    if missing:
        raise KernelUnavailable(f"it has no layer {', '.join(missing)}")
    return Layers(module.__name__, {name: getattr(module.layers, name) for name in names}, module)
