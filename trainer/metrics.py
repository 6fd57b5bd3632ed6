"""What a run tells: `metrics.jsonl`, one line a step in the terminal, a progress bar, and accelerate's trackers."""

import contextlib
import json
import math
import warnings
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm


class Metrics:
    """Writes a run's measurements; only the main process does.

    Args:
        path: of `metrics.jsonl`.
        accelerator: whose trackers are fed.
        total_tokens: length of the run, for the bar.
        log_steps: steps between lines and tracker entries.
        progress: show the bar.
    """

    def __init__(self, path: Path, accelerator: Accelerator, total_tokens: int, log_steps: int, progress: bool):
        self.accelerator, self.log_steps = accelerator, log_steps
        self.main = accelerator.is_main_process
        self.bar = tqdm(
            total=total_tokens,
            unit=" tokens",
            unit_scale=True,
            disable=not (progress and self.main),
            dynamic_ncols=True,
        )
        self.path = path
        self.file = path.open("a") if self.main else None
        self.warned: list[str] = []

    def resume(self, step: int, tokens: int) -> None:
        """Drop what was written after `step`, so that the file has every step once."""
        self.bar.update(tokens - self.bar.n)
        if not self.main:
            return
        self.file.close()
        kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        self.file = self.path.open("a")

    def step(self, entry: dict) -> None:
        """Record one step, and the names of the warnings since the last one."""
        if self.warned:
            entry = {**entry, "warnings": self.warned}
            self.warned = []
        self._write(entry)
        self.bar.update(entry["tokens"] - self.bar.n)
        if entry["step"] % self.log_steps == 0:
            self.say(step_line(entry))
            self.accelerator.log(_flatten(entry), step=entry["step"])

    def evaluation(self, entry: dict) -> None:
        """Record a held-out evaluation."""
        self._write(entry)
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in entry["eval"].items())
        self.say(f"step {entry['step']:>7}  held-out loss  {losses}")
        self.accelerator.log(_flatten(entry), step=entry["step"])

    def warn(self, warning: Warning) -> None:
        """Raise a named warning; its name goes into the next step's line."""
        self.warned.append(type(warning).__name__)
        if self.main:
            warnings.warn(warning, stacklevel=2)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.main:
            tqdm.write(line)

    def close(self) -> None:
        """End bar and file."""
        self.bar.close()
        if self.file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which stopped the run already
                self.file.close()

    def _write(self, entry: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(_plain(entry)) + "\n")
            self.file.flush()


def step_line(entry: dict) -> str:
    """A step in one line; what there is of each layer as its range over the layers."""
    domains = " ".join(f"{name} {loss:.3f}" for name, loss in entry["loss_by_domain"].items())
    realised = "/".join(f"{100 * share:.0f}" for share in entry["realised"].values())
    bound = "" if entry["max_logits_exact"] else "<="
    logits = f"logit {bound}{max(entry['max_logits']):.1f}  " if entry["max_logits"] else ""  # AdamW tracks none
    speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
    speed += f"  MFU {100 * entry['mfu']:.1f}%" if "mfu" in entry else ""
    speed += f"  data wait {100 * entry['data_wait_share']:.1f}%"
    speed += f"  memory {entry['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in entry else ""
    state = f"lambda {min(entry['lambdas']):.2f}..{max(entry['lambdas']):.2f}"
    if "noise_shares" in entry:
        norms = (f"{min(entry[name]):.3g}..{max(entry[name]):.3g}" for name in ("signal_norms", "noise_norms"))
        state += "  signal {}  noise {}".format(*norms) + f" (share {max(entry['noise_shares']):.2f})"
    state += f"  skipped {entry['skipped_steps']}" if entry["skipped_steps"] else ""
    return (
        f"step {entry['step']:>7}  tokens {entry['tokens']:.4g}  loss {entry['loss']:.4f} ({domains})  "
        f"lr {entry['learning_rate']:.2e}  realised {realised}  grad {entry['grad_norm']:.2f}  {logits}"
        f"clipped {entry['clipped_heads']}  {state}  {speed}" + ("  SKIPPED" if entry["skipped"] else "")
    )


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
        return math.inf


def _plain(value):
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flatten(entry: dict) -> dict[str, float]:
    """`{"loss_by_domain": {"math": 2}}` as `{"loss_by_domain/math": 2}`, for trackers."""
    flat = {}
    for key, value in entry.items():
        children = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else None
        if children is None:
            flat[key] = value
        else:
            flat |= {f"{key}/{name}": child for name, child in children.items()}
    return flat
