"""Puts PolyNorm kernels into a model, says which, and proves that they run.

One setting chooses: "official" (Motif-Technologies' kernel from the Hub), "hub" (ours from the Hub), "local" (ours
from this checkout), "torch" (the model's own code), or "auto", which takes the first that works of local, hub,
official: first the code that was tested and measured with this checkout, then what needs the network, last what
others publish.
"""

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .sources import KernelUnavailable, Layers, NotLocked, backend, load_layers

AUTO_ORDER = ("local", "hub", "official")
SOURCES = ("auto", "official", "hub", "local", "torch")
LAYER_OF_CLASS = {"Motif2PolyNormMul": "FusedMulPolyNorm", "Motif2PolyNorm": "PolyNorm"}

_namespaces: set[str] = set()  # of the operators of every kernel that was put into a model
_said: set[str] = set()


@dataclass(frozen=True)
class KernelChoice:
    """What computes a model's PolyNorm.

    Args:
        source: "official", "hub", "local" or "torch".
        namespace: namespace of the kernel's operators; empty for torch.
        num_modules: how many modules it was put into.
        refused: why each source tried before this one could not be used.
    """

    source: str
    namespace: str = ""
    num_modules: int = 0
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source} kernel {self.namespace}" if self.namespace else "plain torch"


def polynorm_modules(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """PolyNorm modules of a model by name, each with the layer name under which `kernels` would replace it."""
    found = {}
    for name, module in model.named_modules():
        layer = getattr(type(module), "kernel_layer_name", None) or LAYER_OF_CLASS.get(type(module).__name__)
        if layer in LAYER_OF_CLASS.values():
            found[name] = (module, layer)
    return found


def use_polynorm(
    model: nn.Module,
    source: str = "auto",
    *,
    training: bool = True,
    revision: str | None = None,
    lockfile: str | Path | None = None,
    trust_remote_code: bool = False,
) -> KernelChoice:
    """Puts PolyNorm kernels into `model`, for training as well as inference, and checks that they run.

    A source that cannot be used here is replaced by torch, with one warning that says why.

    Args:
        model: a model, or a part of one, that contains PolyNorm modules.
        source: "auto", "official", "hub", "local" or "torch".
        training: refuse a kernel that has no backward, and check that training runs it, not inference only.
        revision: commit, tag or branch on the Hub for "official" and "hub"; version 1 by default.
        lockfile: file written by `kernels lock`; commit and content of a kernel from the Hub must be those in it.
            "auto" then takes only what is locked. None or "" is none.
        trust_remote_code: load kernels from publishers whom the Hub does not list as trusted.

    Returns:
        KernelChoice: what runs now; `polynorm_in_use(model)` tells it again.

    Raises:
        ValueError: unknown source, a model without PolyNorm, with its features split over ranks or with a forward that
            another library put in, or a kernel that differs from the lock file.
        AssertionError: the kernel was put in but does not run.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: choose one of {', '.join(SOURCES)}")
    if lockfile and source == "torch":
        raise ValueError(f"{lockfile} locks kernels, and source is 'torch', which loads none: give no lock file")
    modules = _replaceable_modules(model)
    candidates = [] if source == "torch" else [source]
    refused = []
    if source == "auto":
        candidates = list(AUTO_ORDER)
        if backend() == "cpu":
            candidates, refused = [], ["no GPU in this process"]
    options = {
        "revision": revision,
        "lockfile": Path(lockfile) if lockfile else None,
        "trust_remote_code": trust_remote_code,
    }
    loaded, chosen = None, "torch"
    for candidate in candidates:
        try:
            loaded = load_layers(candidate, {layer for _, layer in modules.values()}, **options)
            _check_backward(loaded, training)
        except (KernelUnavailable, NotLocked) as error:
            if isinstance(error, NotLocked) and source != "auto":
                raise
            refused.append(f"{candidate}: {error}")
            loaded = None
            continue
        chosen = candidate
        break
    choice = KernelChoice(chosen, loaded.namespace if loaded else "", len(modules), tuple(refused))
    _install(modules, loaded, choice)
    if chosen == "torch" and source != "torch":
        _once(f"PolyNorm runs in plain torch, not as a kernel: {'; '.join(refused)}", warnings.warn)
    if _is_main_process():
        _once(f"PolyNorm: {choice}", lambda text: print(text, file=sys.stderr))
    if not any(_device(module).type == "meta" for module, _ in modules.values()):
        assert_polynorm_runs(model, training=training)
    return choice


def _replaceable_modules(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """As `polynorm_modules`; refuses a model without any, and forwards that are neither the model's nor ours."""
    modules = polynorm_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no PolyNorm module: is it a Motif-2 model?")
    for name, (module, _) in modules.items():
        if hasattr(module, "reduces_over_ranks"):
            raise ValueError(
                f"{name} adds over {module.reduces_over_ranks} ranks, which no other source can: leave it as it is"
            )
        if not (_is_own(module) or _is_ours(module)):
            raise ValueError(
                f"{name} runs {_function(module)!r}, which use_polynorm did not put there: take it out first, or put "
                "the kernel in before it"
            )
    return modules


def _check_backward(loaded: Layers, training: bool) -> None:
    lacking = [name for name, layer in loaded.classes.items() if not getattr(layer, "has_backward", True)]
    if training and lacking:
        raise KernelUnavailable(f"{', '.join(lacking)} has no backward")


def _is_main_process() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # as launchers set it before the processes have met


def _once(text: str, say: Callable) -> None:
    if text not in _said:
        _said.add(text)
        say(text)


def _forward_name(module: nn.Module) -> str:
    """The attribute that holds what computes; accelerate's device hook takes `forward` and keeps it in another."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _function(module: nn.Module) -> Callable:
    forward = getattr(module, _forward_name(module))
    return getattr(forward, "__func__", forward)


def _is_own(module: nn.Module) -> bool:
    return _function(module) is type(module).forward


def _is_ours(module: nn.Module) -> bool:
    return "_polynorm" in module.__dict__ and module._polynorm[0] is _function(module)


def _device(module: nn.Module) -> torch.device:
    """Where the module computes; a hook that offloads keeps its parameters on the meta device in between."""
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
    if device is None or not module.weight.is_meta:
        return module.weight.device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _install(modules: dict[str, tuple[nn.Module, str]], loaded: Layers | None, choice: KernelChoice) -> None:
    for module, layer in modules.values():
        name = _forward_name(module)
        module.__dict__.pop(name, None)
        module.__dict__.pop("_polynorm", None)
        if loaded is not None:
            forward = loaded.classes[layer].forward
            setattr(module, name, MethodType(forward, module))
            module._polynorm = (forward, choice)
            _namespaces.add(loaded.namespace)
        elif name != "forward":
            setattr(module, name, MethodType(type(module).forward, module))


def polynorm_in_use(model: nn.Module) -> KernelChoice:
    """What computes PolyNorm in `model` now, read off the modules themselves.

    Raises:
        ValueError: the model has no PolyNorm, or its modules differ, or run what `use_polynorm` did not put in.
    """
    found = set()
    modules = polynorm_modules(model)
    for module, _ in modules.values():
        if _is_own(module):
            found.add(KernelChoice("torch", num_modules=len(modules)))
        elif _is_ours(module):
            found.add(module._polynorm[1])
        else:
            raise ValueError(
                f"{type(module).__name__} runs {_function(module)!r}, which use_polynorm did not put there"
            )
    if len(found) != 1:
        raise ValueError(f"the model's PolyNorm modules differ: {sorted(map(str, found)) or 'there are none'}")
    return found.pop()


def assert_polynorm_runs(
    model: nn.Module, step: Callable[[], object] | None = None, *, training: bool = True, compiled: bool = False
) -> KernelChoice:
    """Asserts that the kernel in use is what really runs, by the operators that are called.

    Args:
        model: a model that went through `use_polynorm`.
        step: runs the model forward and backward, such as one training step; operators are counted in it. Without it
            every PolyNorm module runs once in training mode with its backward and once in evaluation mode.
        training: without `step`, run the modules in training mode too; those made in torch's inference mode cannot.
        compiled: `step` runs machine code made before, which PyTorch would leave where operators are noted one by one:
            its profiler tells them instead.

    Returns:
        KernelChoice: what ran.

    Raises:
        AssertionError: too few of the kernel's operators ran, or a kernel's where torch was chosen.
    """
    choice = polynorm_in_use(model)
    modules = [module for module, _ in polynorm_modules(model).values()]
    if step is not None:
        names = _profiled_operators(step) if compiled else _operators(step)
        _assert_counts(choice, names, 2 * len(modules), "the step")
        return choice
    for module, layer in polynorm_modules(model).values():
        num_inputs = 2 if layer == "FusedMulPolyNorm" else 1
        was_training = module.training
        try:
            if training and not module.weight.is_inference():
                module.train()
                _assert_counts(choice, _operators(lambda m=module, n=num_inputs: _run(m, n, True)), 2, "training")
            module.eval()
            _assert_counts(choice, _operators(lambda m=module, n=num_inputs: _run(m, n, False)), 1, "inference")
        finally:
            module.train(was_training)
    return choice


def _run(module: nn.Module, num_inputs: int, with_backward: bool) -> None:
    """Runs `module` on ones, with the gradients of its input and of those parameters that are trained."""
    with torch.inference_mode(False), torch.set_grad_enabled(with_backward):
        x = torch.ones(1, 16, device=_device(module), dtype=module.weight.dtype, requires_grad=with_backward)
        output = module(*[x] * num_inputs)
        if with_backward:
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            # What a hook offloads is computed with as a copy: the parameter itself gets no gradient.
            torch.autograd.grad(output.sum(), [x, *trained], allow_unused=module.weight.is_meta)


class _Operators(TorchDispatchMode):
    """Notes the name of every operator that runs, in the backward too."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def _operators(step: Callable[[], object]) -> list[str]:
    with _Operators() as seen:
        step()
    return seen.names


def _profiled_operators(step: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    return [event.name for event in seen.events()]


def _assert_counts(choice: KernelChoice, names: list[str], expected: int, where: str) -> None:
    ran = [name for name in names if name.split("::")[0] in _namespaces]
    if choice.source == "torch":
        assert not ran, f"PolyNorm was to run in torch in {where}, but these operators ran: {sorted(set(ran))}"
        return
    own = [name for name in ran if name.startswith(choice.namespace + "::")]
    assert len(own) >= expected, (
        f"PolyNorm was to run {choice} in {where}, at least {expected} operators, but {len(own)} ran: "
        "something replaced the forward of its modules, or it was not run in this mode (a step: forward and backward)"
    )
