"""Which way of computing a layer's attention was fastest here: measured once, kept in a file of the user's cache.

Choices are kept by device, versions, heads, size and kind of mask, separately for training and inference.

Shapes: B batch, T query tokens, S key tokens, G groups, r signal heads a group, D head dimension.
"""

import contextlib
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
from torch.utils._python_dispatch import _disable_current_modes

from .attention_ways import KERNEL, SDPA, WAYS, Way
from .visible_intervals import is_intervals

ROUNDS, WARM_UP = 5, 2
# Largest relative difference from SDPA's result (assumption: four times what rounding to bfloat16 gives).
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


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
        tracked: whether maximum logits are.
    """

    device: str
    dtype: torch.dtype
    heads: tuple[int, int, int]
    rows: int
    queries: int
    keys: int
    kind: str
    training: bool
    tracked: bool = False

    def key(self, ways: list[Way], namespace: str) -> str:
        """Returns this situation's name in the file, with the versions that matter and the ways to choose from."""
        sizes = f"{self.heads} B{self.rows} T{self.queries} S{self.keys}"
        direction = ("training" if self.training else "inference") + " with maxima" * self.tracked
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
_latest: dict[tuple[str, bool, bool], str] = {}  # what compiled code takes: by kind, training, whether for one token
_read_from: set[Path] = set()


def latest_way(kind: str, training: bool, one_token: bool) -> Way | None:
    """Returns what was last measured, or read, for a kind of mask in this process, one token or more a row."""
    return WAYS.get(_latest.get((kind, training, one_token), ""))


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


def situation_of(
    query: torch.Tensor, key: torch.Tensor, kind: str, training: bool, tracked: bool = False
) -> Situation:
    """Returns what a call with a query (B, G * r, T, D) and a key (B, G, 2, S, D) is measured as."""
    batch, heads, tokens, dim = query.shape
    groups, keys = key.shape[1], key.shape[3]
    rounded = (1 << max(0, size - 1).bit_length() for size in (batch, tokens, keys))
    name = torch.cuda.get_device_name(query.device) if query.device.type == "cuda" else query.device.type
    return Situation(name, query.dtype, (groups, heads // groups, dim), *rounded, kind, training, tracked)


def measured_choice(attention, situation: Situation, ways: list[Way], query, key, mask, kwargs) -> Choice:
    """Returns what was chosen in a situation, measuring if it is new; arguments as in `attention_choice.choose`."""
    namespace = attention.kernel.namespace if KERNEL in ways else ""
    name = situation.key(ways, namespace)
    if name not in _choices:
        _read()
    if name not in _choices:
        _choices[name] = _measure(attention, ways, query, key, mask, situation.training, kwargs)
        _write()
    _latest[situation.kind, situation.training, situation.queries == 1] = _choices[name].name
    return _choices[name]


def _measure(attention, ways: list[Way], query, key, mask, training: bool, kwargs) -> Choice:
    """Runs every way on random numbers of these shapes.

    The first way that runs, SDPA where it can, is what the others are compared with. Hooks on saved tensors and modes
    of dispatch, such as a checkpointed layer's, do not see the measurement: they would take its results for the
    layer's. Maximum logits are tracked where the layer does, for that is part of each way's time, but on a copy.
    """
    tracked = attention.max_logits, attention.output_norms
    attention.output_norms = None
    if attention.max_logits is not None:
        attention.max_logits = attention.max_logits.clone()
    times, refused, wanted = {}, {}, None
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    try:
        with (
            torch.inference_mode(False), torch.set_grad_enabled(training), torch.cuda.device_of(query), unhooked,
            _disable_current_modes(),
        ):  # fmt: skip
            run = None
            for way in ways:
                try:
                    run = run or _trial(attention, query, key, mask, training, kwargs)
                    found = run(way)
                    wanted = found if wanted is None else wanted
                    _check(found, wanted)
                    del found
                    times[way.name] = _milliseconds(lambda run=run, way=way: run(way), query.device)
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
