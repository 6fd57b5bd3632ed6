"""Checkpoints that are whole or absent: written beside, checked by checksum, then renamed.

A folder `step_00000100/` holds model and optimizer as torch.distributed.checkpoint shards, `trainer_state.pt` (step,
data position, counters), one `random_<rank>.pt` a rank, and one `checksums_<rank>.json` a rank over that rank's files.
"""

import contextlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from trainer.data.shards import file_checksum

PREFIX = "step_"
UNFINISHED = ".tmp"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint.
        accelerator: of the run.
        keep_last: how many complete ones to keep.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep_last: int):
        self.folder, self.accelerator, self.keep_last = folder, accelerator, keep_last

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(iter(reversed(complete_checkpoints(self.folder))), None)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, trainer_state: dict) -> Path:
        """Write a checkpoint of all ranks; it gets its name only when it is complete on disk.

        Args:
            model, optimizer: prepared or plain.
            trainer_state: numbers, strings and tensors, with `step`; equal on all ranks.

        Raises:
            RuntimeError: it could not be written; earlier checkpoints are untouched.
        """
        step = trainer_state["step"]
        target = self.folder / f"{PREFIX}{step:08d}"
        unfinished = target.with_name(target.name + UNFINISHED)
        try:
            self._write(unfinished, model, optimizer, trainer_state)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                if target.exists():
                    shutil.rmtree(target)
                os.replace(unfinished, target)
                _sync_folder(self.folder)
                self._prune()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written to {target}: {error}; the last complete one is "
                f"{self.latest()}: free the disk and start the same command again"
            ) from error
        self.accelerator.wait_for_everyone()
        return target

    def _write(self, folder: Path, model, optimizer, trainer_state: dict) -> None:
        rank = self.accelerator.process_index
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with _quiet():
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        torch.save(_random_state(), folder / f"random_{rank}.pt")
        own = [f"random_{rank}.pt", *(path.name for path in folder.glob(f"__{rank}_*"))]
        if self.accelerator.is_main_process:
            torch.save(trainer_state, folder / "trainer_state.pt")
            own += ["trainer_state.pt", ".metadata"]
        checksums = {name: file_checksum(folder / name) for name in sorted(own)}
        _write_synced(folder / f"checksums_{rank}.json", json.dumps(checksums))

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Restore model, optimizer and random states in place.

        Returns:
            dict: the trainer's state.

        Raises:
            ValueError: a file is missing or corrupted, or the checkpoint is of a model of another shape.
        """
        verify_checkpoint(path)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        _check_shapes(path, model_state)
        with _quiet():
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        own_random_state = path / f"random_{self.accelerator.process_index}.pt"
        if own_random_state.is_file():  # absent when there are more ranks than before
            _restore_random_state(torch.load(own_random_state, weights_only=True))
        return torch.load(path / "trainer_state.pt", weights_only=True)

    def _prune(self) -> None:
        for path in complete_checkpoints(self.folder)[: -self.keep_last]:
            shutil.rmtree(path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.suffix != UNFINISHED)


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its checksum.

    Raises:
        ValueError: a file is missing or corrupted; it is named.
    """
    lists = sorted(path.glob("checksums_*.json"))
    if not lists:
        raise ValueError(f"{path} is no checkpoint of this trainer (no checksums): choose another folder")
    for entry in lists:
        for name, expected in json.loads(entry.read_text()).items():
            file = path / name
            if not file.is_file():
                raise ValueError(f"checkpoint file {file} is lost: delete {path} to go on from the one before")
            if file_checksum(file) != expected:
                raise ValueError(f"checkpoint file {file} is corrupted: delete {path} to go on from the one before")


@contextlib.contextmanager
def _quiet():
    """Without the warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _check_shapes(path: Path, model_state: dict) -> None:
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {
        name.removeprefix("model."): tuple(value.size) for name, value in stored.items() if _is_weight(name, value)
    }
    expected = {name: tuple(value.shape) for name, value in model_state.items()}
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{path} is of another shape: {name} is {shapes.get(name)} there and {expected.get(name)} in this "
                "run's model: use the recipe it was made with, or another output_dir"
            )


def _is_weight(name: str, value) -> bool:
    return name.startswith("model.") and hasattr(value, "size")


def _random_state() -> dict:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
