"""The folder of a run: who may write into it, and how the final model gets there."""

import contextlib
import os
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError

from trainer.checkpoint_files import MODEL_CONFIG, complete_checkpoints
from trainer.config import PretrainConfig
from trainer.errors import RunStoppedError

MODEL, CHECKPOINTS, METRICS, CONFIG = "model", "checkpoints", "metrics.jsonl", "config.yaml"
TRACKED = "pretrain"  # what trackers call the run; tensorboard's files lie in a folder of that name
RUNS_HAVE = {"output_dir", "data_dir", "domains", "total_tokens"}  # settings that tell a run's from others' files
DECIDE_AVERAGES = {"checkpoint_steps", "keep_last"}  # where checkpoints are averaged, these decide the weights too
# Settings that may change when a run goes on: they decide neither the weights nor the order of the data.
FREE_SETTINGS = frozenset(
    {
        "output_dir",
        "overwrite",
        "data_dir",
        "tokenizer",
        "polynorm",
        "kernels_lock",
        "trust_kernels",
        "attn_implementation",
        "muon_chunk_size",
        "muon_copy_engines",
        "verify_checksums",
        "micro_batch_tokens",
        "gradient_checkpointing",
        "gradient_checkpointing_every",
        "compile_layers",
        "tensor_parallel",
        "loss",
        "max_skipped_steps",
        "data_workers",
        "checkpoint_steps",
        "async_checkpoints",
        "keep_last",
        "keep_every_steps",
        "max_rewinds",
        "timeout_seconds",
        "log_steps",
        "exact_logit_steps",
        "norm_steps",
        "warn_noise_share",
        "warn_memory_rise",
        "warn_stall_steps",
        "warn_stall_drop",
        "eval_steps",
        "eval_tokens",
        "trackers",
        "progress",
        "peak_tflops",
        "dry_run",
        "dry_run_gpus",
        "dry_run_shards",
        "dry_run_mfu",
    }
)


def open_run_folder(config: PretrainConfig, accelerator: Accelerator) -> Path:
    """Create the run's folder, or enter that of an interrupted run with the same settings.

    Raises:
        ValueError: it holds a finished run, a run with other settings, or something that is no run.
    """
    folder = Path(config.output_dir)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            _claim(config, folder)
        elif not (folder / CONFIG).is_file():
            raise ValueError(
                f"output_dir {folder} was refused on the main rank, or is not shared between the machines"
            )
    return folder


def _claim(config: PretrainConfig, folder: Path) -> None:
    if (folder / MODEL_CONFIG).exists():
        raise ValueError(f"output_dir {folder} is itself a model or a checkpoint: choose another output_dir")
    if complete_checkpoints(folder) or (folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file()):
        raise ValueError(
            f"output_dir {folder} holds the checkpoints of a run: give {folder.parent} to go on with it, or choose "
            "another output_dir"
        )
    if config.overwrite and not _is_interrupted(config, folder):
        for name in (MODEL, CHECKPOINTS, METRICS, CONFIG):
            _delete(folder / name)
        for events in (folder / TRACKED).glob("events.out.tfevents.*"):  # else its curves and the new run's are one
            _delete(events)
    if (folder / MODEL).exists():
        raise ValueError(f"{folder} holds a finished run: choose another output_dir, or give --overwrite to delete it")
    _check_same_run(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{CONFIG}.tmp"
    written.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    os.replace(written, folder / CONFIG)  # killed in between, the run still has its settings
    (folder / CHECKPOINTS).mkdir(exist_ok=True)


def _is_interrupted(config: PretrainConfig, folder: Path) -> bool:
    """Whether this very run was cut here: a command that is started again must not delete its own progress."""
    if (folder / MODEL).exists() or not complete_checkpoints(folder / CHECKPOINTS):
        return False
    with contextlib.suppress(ValueError):
        _check_same_run(config, folder)
        return True
    return False


def _check_same_run(config: PretrainConfig, folder: Path) -> None:
    before, now = _settings_of(folder), config.to_dict()
    if not complete_checkpoints(folder / CHECKPOINTS):
        return
    free = FREE_SETTINGS - (DECIDE_AVERAGES if config.average_every_tokens else set())
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if changed:
        changes = ", ".join(f"{name} {before.get(name)!r} -> {now[name]!r}" for name in changed)
        raise ValueError(
            f"{folder} holds checkpoints of a run with other settings ({changes}): use its settings to go on with it, "
            "choose another output_dir, or give --overwrite"
        )


def _settings_of(folder: Path) -> dict | None:
    """Settings of the run that a folder holds; None where there is none."""
    left = [name for name in (CHECKPOINTS, METRICS, CONFIG) if _holds_something(folder / name)]
    if not left:
        return None
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict) or not settings.keys() >= RUNS_HAVE:
        raise ValueError(
            f"output_dir {folder} holds {' and '.join(left)}, but {folder / CONFIG} is not the settings of a run "
            "(lost, cut short, or another program's): choose another output_dir, give --overwrite to delete what is "
            "there, or, to go on with a run, write its settings to that file again"
        )
    return settings


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def save_whole(model, state_dict: dict, tokenizer, target: Path) -> Path:
    """Write model and tokenizer with `save_pretrained`, complete or not at all.

    Args:
        model: whose class and configuration are saved.
        state_dict: its weights.
        tokenizer: saved beside them.
        target: folder; must not exist.

    Returns:
        Path: `target`.

    Raises:
        RunStoppedError: the disk refused it.
    """
    unfinished = target.with_name(target.name + ".tmp")
    _delete(unfinished)
    tied = model.all_tied_weights_keys  # gathered from several ranks they are copies, of which one is written
    state_dict = {name: state_dict[tied.get(name, name)] for name in state_dict}
    try:
        model.save_pretrained(unfinished, state_dict=state_dict)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        _delete(unfinished)
        raise RunStoppedError(f"{target} could not be written: {error}; free the disk and start again") from error
    return target


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
