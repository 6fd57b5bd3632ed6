"""Attention by measurement: `attn_implementation="gda_fastest"` runs a layer in the way that was fastest here.

Ways are PyTorch's SDPA as it chooses, its FlashAttention and cuDNN kernels, cuDNN with the value in one piece of 2D,
FlexAttention, flash-attention's packages where they are installed, and the kernel of `kernels_hub/gda_attention` once
`kernels_hub.use_gda_attention` has put it into the model, with its own passes or FlashAttention-4's. A way that
fails, or disagrees with SDPA, is refused. What won is kept by device, versions, heads, size and kind of mask,
separately for training and inference, in a file of the user's cache folder. Nothing is measured outside a GPU (SDPA
runs) or while compiling (what was last measured for the same kind of mask runs; before that the kernel, or SDPA).
`"gda_kernel"` runs the kernel wherever it can, unmeasured.

Shapes: B batch, T query tokens, S key tokens, G groups, r signal heads a group, D head dimension.
"""

import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from .diagnostics import keeps_max_logits
from .visible_intervals import boolean_mask, causal_block_mask, is_intervals, visible_intervals

CHOOSERS = ("gda_fastest", "gda_kernel")
ROUNDS, WARM_UP = 5, 2
FLEX_SIZES = 64  # sizes that FlexAttention is compiled for before it runs uncompiled (assumption)
# Largest relative difference from SDPA's result (assumption: four times what rounding to bfloat16 gives).
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Way:
    """One way to compute a layer's attention.

    Args:
        name: in reports.
        backend: name of transformers' attention function; empty for the kernel, which does both maps and the norm.
        wide: whether the value goes in one piece of 2D.
        sdpa: kernel that SDPA must take.
        forward: of the kernel, its "own" or FlashAttention-4's ("flash").
        backward: the same.
    """

    name: str
    backend: str
    wide: bool = False
    sdpa: SDPBackend | None = None
    forward: str = "own"
    backward: str = "own"

    def context(self) -> contextlib.AbstractContextManager:
        """Returns what holds SDPA to its kernel, and keeps FlexAttention compiled for many sizes."""
        if self.backend == "flex_attention":
            return torch._dynamo.config.patch(recompile_limit=FLEX_SIZES)
        return contextlib.nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa)

    def stream(self, module: nn.Module) -> nn.Module:
        """Returns the stream to hand to the backend: flash attention reads its own name off the configuration."""
        if not self.backend.startswith("flash"):
            return module
        module = copy.copy(module)
        module.config = copy.copy(module.config)
        module.config._attn_implementation = self.backend
        return module

    def mask(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> Any:
        """Returns the mask in the backend's form, for a query (B, heads, T, D) and a key (B, G, 2, S, D)."""
        tokens, keys = query.shape[2], key.shape[3]
        if self.backend == "flex_attention" and mask is None and tokens > 1:
            return causal_block_mask(tokens, keys, query.device)
        return boolean_mask(mask, keys) if is_intervals(mask) else mask


SDPA = Way("sdpa", "sdpa")
KERNEL = Way("kernel", "")
FLASH_BACKWARD = Way("kernel, flash backward", "", backward="flash")
FLASH = Way("kernel, flash", "", forward="flash", backward="flash")
WAYS = {
    way.name: way
    for way in (
        SDPA,
        Way("sdpa flash", "sdpa", sdpa=SDPBackend.FLASH_ATTENTION),
        Way("sdpa cudnn", "sdpa", sdpa=SDPBackend.CUDNN_ATTENTION),
        Way("sdpa cudnn wide", "sdpa", wide=True, sdpa=SDPBackend.CUDNN_ATTENTION),
        Way("flex_attention", "flex_attention"),
        Way("flash_attention_2", "flash_attention_2"),
        Way("flash_attention_3", "flash_attention_3"),
        Way("flash_attention_4", "flash_attention_4"),
        KERNEL,
        FLASH_BACKWARD,
        FLASH,
    )
}


@dataclass(frozen=True)
class Situation:
    """What a choice is made for; sizes are rounded up to powers of 2.

    Args:
        device: name of the device.
        dtype: of the queries.
        heads: groups, signal heads a group, head dimension.
        rows: B.
        queries: T.
        keys: S.
        kind: "causal", "masked" (padding, windows, packs told by positions) or "packed" (told by lengths).
        training: forward and backward, or the forward alone.
    """

    device: str
    dtype: torch.dtype
    heads: tuple[int, int, int]
    rows: int
    queries: int
    keys: int
    kind: str
    training: bool

    def key(self, ways: list[Way], namespace: str) -> str:
        """Returns this situation's name in the file, with the versions that matter and the ways to choose from."""
        sizes = f"{self.heads} B{self.rows} T{self.queries} S{self.keys}"
        direction = "training" if self.training else "inference"
        names = ", ".join(way.name for way in ways)
        software = f"torch {torch.__version__} {_libraries()} {namespace}".strip()
        return f"{self.device} | {software} | {self.dtype} {sizes} {self.kind} {direction} | {names}"


@cache
def _libraries() -> str:
    """Names and versions of what the ways are made of, as far as installed."""
    found = []
    for name in ("transformers", "triton", "flash-attn", "flash-attn-3", "flash-attn-4"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return " ".join(found)


@dataclass(frozen=True)
class Choice:
    """What was chosen in a situation.

    Args:
        name: the way.
        milliseconds: median time of every way that ran and agreed.
        refused: why each other way was not taken.
    """

    name: str
    milliseconds: dict[str, float]
    refused: dict[str, str]


_choices: dict[str, Choice] = {}
_latest: dict[tuple[str, bool], str] = {}  # by kind and training: what compiled code takes
_read_from: set[Path] = set()


def cache_path() -> Path:
    """Returns the file that keeps the choices: `$XDG_CACHE_HOME` or ~/.cache, then motif2/attention_choice.json."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "motif2" / "attention_choice.json"


def choices() -> dict[str, Choice]:
    """Returns every choice that is known, by situation: measured in this process or read from the file."""
    _read()
    return dict(_choices)


def forget_choices() -> None:
    """Forgets every choice, and deletes the file."""
    _choices.clear()
    _latest.clear()
    _read_from.clear()
    cache_path().unlink(missing_ok=True)


def choose(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]
) -> Way | None:
    """Returns the way for this call of a layer, measuring if this is new; None: the one the configuration names.

    Args:
        attention: the `Motif2Attention`.
        query: signal queries (B, G * r, T, D).
        key: (B, G, 2, S, D).
        mask: intervals (2, B, T), a boolean mask (B or 1, 1, T, S), or None for causal order.
        kwargs: of the attention call.
    """
    name = attention.config._attn_implementation
    if name not in CHOOSERS:
        return None
    if attention.config.single_attention_call:
        return SDPA
    kind = "causal" if mask is None else "masked"
    if mask is None and kwargs.get("cu_seq_lens_q") is not None:
        kind = "packed"
    ways = possible_ways(attention, query, key, mask, kind)
    if name == "gda_kernel" or query.device.type == "cpu" or len(ways) == 1:
        return KERNEL if name == "gda_kernel" and KERNEL in ways else SDPA
    training = _is_training(query, key)
    if torch.compiler.is_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        latest = WAYS.get(_latest.get((kind, training), ""))
        if latest in ways:
            return latest
        return KERNEL if KERNEL in ways else SDPA
    situation = _situation(query, key, kind, training)
    return WAYS[_measured(attention, situation, ways, query, key, mask, kwargs).name]


def _is_training(query: torch.Tensor, key: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)


def possible_ways(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kind: str) -> list[Way]:
    """Returns the ways that could do this call, SDPA first; arguments as in `choose`."""
    ways = [SDPA]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half:
        if mask is None:
            ways.append(WAYS["sdpa flash"])
        ways += [WAYS["sdpa cudnn"], WAYS["sdpa cudnn wide"]]
        if mask is None and is_flash_attn_2_available():
            ways.append(WAYS["flash_attention_2"])
        if mask is None and is_flash_attn_3_available():
            ways.append(WAYS["flash_attention_3"])
        if mask is None and is_flash_attn_4_available():
            ways.append(WAYS["flash_attention_4"])
    if query.device.type == "cuda" and kind == "causal" and query.shape[2] > 1 and not torch.compiler.is_compiling():
        ways.append(WAYS["flex_attention"])
    kernel, groups = attention.kernel, key.shape[1]
    ratio = query.shape[1] // groups
    if (
        kernel is not None
        and kernel.supports(query.shape[3], query.dtype, ratio, query.device)
        and (mask is None or is_intervals(mask))
        and attention.output_norms is None  # the norms are of the two maps' own outputs
        # A rank's share: the norm's gradient is summed.
        and (groups == attention.num_groups or not query.requires_grad)
    ):
        ways.append(KERNEL)
        if kind == "causal" and kernel.supports_flash(query.shape[3], query.dtype, query.device):
            ways += _ways_of_flash(attention, query, key)
    return ways


def _ways_of_flash(attention: nn.Module, query: torch.Tensor, key: torch.Tensor) -> list[Way]:
    """The ways with FlashAttention-4's passes: its forward gives no largest logits, its backward sums in no order."""
    training = _is_training(query, key)
    if not 1 < query.shape[2] <= key.shape[3] or (training and torch.are_deterministic_algorithms_enabled()):
        return []
    return [FLASH_BACKWARD] * training + [FLASH] * (not keeps_max_logits(attention))


def _situation(query: torch.Tensor, key: torch.Tensor, kind: str, training: bool) -> Situation:
    batch, heads, tokens, dim = query.shape
    groups, keys = key.shape[1], key.shape[3]
    rounded = (1 << max(0, size - 1).bit_length() for size in (batch, tokens, keys))
    name = torch.cuda.get_device_name(query.device) if query.device.type == "cuda" else query.device.type
    return Situation(name, query.dtype, (groups, heads // groups, dim), *rounded, kind, training)


def _measured(attention, situation: Situation, ways: list[Way], query, key, mask, kwargs) -> Choice:
    namespace = attention.kernel.namespace if KERNEL in ways else ""
    name = situation.key(ways, namespace)
    if name not in _choices:
        _read()
    if name not in _choices:
        _choices[name] = _measure(attention, ways, query, key, mask, situation.training, kwargs)
        _write()
    _latest[situation.kind, situation.training] = _choices[name].name
    return _choices[name]


def _measure(attention, ways: list[Way], query, key, mask, training: bool, kwargs) -> Choice:
    """Runs every way on random numbers of these shapes; the layer's diagnostics are off meanwhile.

    The first way that runs, SDPA where it can, is what the others are compared with. Hooks on saved tensors, such as a
    checkpointed layer's, do not see the measurement.
    """
    tracked = attention.max_logits, attention.output_norms
    attention.max_logits = attention.output_norms = None
    times, refused, wanted = {}, {}, None
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(training), torch.cuda.device_of(query), unhooked:
            run = _trial(attention, query, key, mask, training, kwargs)
            for way in ways:
                try:
                    found = run(way)
                    wanted = found if wanted is None else wanted
                    _check(found, wanted)
                    del found
                    times[way.name] = _milliseconds(lambda way=way: run(way), query.device)
                except Exception as error:  # whatever a library raises, another way does the work
                    said = str(error).splitlines()[0][:200] if str(error) else ""
                    refused[way.name] = f"{type(error).__name__}: {said}"
    finally:
        attention.max_logits, attention.output_norms = tracked
    if not times:
        print(f"no attention could be measured, so SDPA runs: {refused}", file=sys.stderr)
    return Choice(min(times, key=times.get, default=SDPA.name), times, refused)


def _trial(attention, query, key, mask, training: bool, kwargs) -> Callable[[Way], list[torch.Tensor]]:
    """Returns what runs a way on random numbers and gives its output and gradients; padding's are zeros."""
    generator = torch.Generator(query.device).manual_seed(0)
    batch, heads, tokens, dim = query.shape
    groups, keys = key.shape[1], key.shape[3]

    def random(*shape: int) -> torch.Tensor:  # (B, heads …, tokens, D) as projections leave it
        drawn = torch.randn(shape[0], shape[-2], *shape[1:-2], shape[-1], generator=generator, device=query.device)
        return drawn.to(query.dtype).movedim(1, -2).requires_grad_(training)

    inputs = [random(batch, heads, tokens, dim), random(batch, groups, tokens, dim)]
    inputs += [random(batch, groups, 2, keys, dim) for _ in range(2)]
    shape = (batch, tokens, groups, heads // groups, 2 * dim)
    counted = torch.ones((), device=query.device, dtype=query.dtype)
    if is_intervals(mask):  # what a query that sees nothing gives is nobody's matter, and differs from way to way
        counted = (mask[0] <= mask[1]).to(query.dtype)[:, :, None, None, None]  # (B, T, 1, 1, 1)
    gradient = torch.randn(shape, generator=generator, device=query.device).to(query.dtype) * counted

    def run(way: Way) -> list[torch.Tensor]:
        out, _ = attention.attend(way, *inputs, mask, **kwargs)
        return [out.detach() * counted, *(torch.autograd.grad(out, inputs, gradient) if training else ())]

    return run


def _check(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        difference = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        limit = LARGEST_DIFFERENCE.get(theirs.dtype, 1e-3)
        if not difference <= limit:
            raise ValueError(f"differs from the first way by {float(difference):.1e}, more than {limit:.0e}")


def _milliseconds(function: Callable, device: torch.device) -> float:
    """Returns the median time of a call."""
    times = []
    for attempt in range(WARM_UP + ROUNDS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            started = time.perf_counter()
            function()
            elapsed = 1e3 * (time.perf_counter() - started)
        if attempt >= WARM_UP:
            times.append(elapsed)
    return statistics.median(times)


def _read() -> None:
    path = cache_path()
    if path in _read_from or not path.is_file():
        return
    _read_from.add(path)
    for name, entry in _kept(path).items():
        if entry["name"] in WAYS:
            _choices.setdefault(name, Choice(**entry))


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the file's entries that are whole; a file that is cut or of another version has none."""
    fields = {"name", "milliseconds", "refused"}
    try:
        entries = json.loads(path.read_text())
        return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and entry.keys() == fields}
    except (OSError, ValueError, AttributeError):
        return {}


def _write() -> None:
    """Adds what was measured to the file; a folder that cannot be written to only costs measuring again."""
    path = cache_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _kept(path) | {name: vars(choice) for name, choice in _choices.items() if choice.milliseconds}
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(kept, indent=1))
        os.replace(fresh, path)


def attend_with_kernel(
    attention: nn.Module,
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    way: Way = KERNEL,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the kernel put into the layer.

    Args:
        attention: the `Motif2Attention`.
        signal_query: (B, G * r, T, D).
        noise_query: (B, G, T, D).
        key: (B, G, 2, S, D).
        value: (B, G, 2, S, D).
        mask: intervals (2, B, T), or None for causal order.
        way: whose passes it takes.

    Returns:
        Output after `subln` (B, T, G, r, 2D), and the largest logits (G, r + 1), None of a single token and of
        FlashAttention-4's forward.
    """
    groups = key.shape[1]
    arguments = (
        signal_query.unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4),  # (B, T, G, r, D)
        noise_query.transpose(1, 2),  # (B, T, G, D)
        *(states.permute(0, 3, 1, 2, 4) for states in (key, value)),  # (B, S, G, 2, D)
        attention.lambda_value().to(signal_query.dtype),
        attention.subln.weight,
    )
    options = {"eps": attention.subln.variance_epsilon, "scaling": attention.scaling}
    passes = {"forward": way.forward, "backward": way.backward}
    if mask is not None:
        options["first"], options["last"] = mask
    out_scale = 1 - attention.lambda_init
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in arguments)
    if not wants_gradient:
        if signal_query.shape[2] == 1:
            return attention.kernel.decode(*arguments, out_scale=out_scale, **options), None
        return attention.kernel.attend(*arguments, out_scale=out_scale, **passes, **options)
    # A factor of the weight, not of the operator: compiled layers, each with its own, share their code.
    weight = attention.subln.weight * out_scale
    return attention.kernel.attend(*arguments[:-1], weight, out_scale=1.0, **passes, **options)


for _name in CHOOSERS:
    # `Motif2AttentionStream` asks for the way's own backend; the name alone, elsewhere, is SDPA.
    AttentionInterface.register(_name, sdpa_attention_forward)
    AttentionMaskInterface.register(_name, visible_intervals)
