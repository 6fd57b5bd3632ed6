"""Checkpoints that are whole or absent, written while training goes on.

`save` copies the state to host memory and returns; a thread then lets torch.distributed.checkpoint write every rank's
shards beside the final name, waits until they are on the disk, takes their checksums, and renames the folder once all
ranks are done. The ranks agree through a gloo group of their own, so nothing meets the training's collectives.
The files are described in `trainer/checkpoint_files.py`.
"""

import io
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from trainer.checkpoint_files import (
    CHECKSUMS,
    METADATA,
    MODEL_CONFIG,
    TRAINER_STATE,
    UNFINISHED,
    checkpoint_name,
    complete_checkpoints,
    prune,
    remove_checkpoint,
    remove_unfinished,
    sync_folder,
    verify_checkpoint,
    write_synced,
)
from trainer.data.shards import file_checksum
from trainer.errors import CheckpointError
from trainer.random_state import random_state, restore_random_state

# Only says that there is one process; a thread cannot silence it for itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint.
        accelerator: of the run.
        keep_last: how many of the newest to keep.
        keep_every_steps: also keep those of every so many steps; 0 keeps none besides.
        asynchronous: return from `save` before the files are written; otherwise wait for them.
        timeout_seconds: how long a rank waits for the others' part.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        keep_last: int,
        keep_every_steps: int = 0,
        asynchronous: bool = False,
        timeout_seconds: float = 1800,
    ):
        self.folder, self.accelerator, self.asynchronous = folder, accelerator, asynchronous
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        timeout = timedelta(seconds=timeout_seconds)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future | None = None
        self._told = False

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(iter(reversed(complete_checkpoints(self.folder))), None)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, trainer_state: dict) -> Path:
        """Write a checkpoint of all ranks; it gets its name only when it is complete on disk.

        Args:
            model, optimizer: prepared or plain.
            trainer_state: numbers, strings and tensors, with `step`; equal on all ranks.

        Returns:
            Path: the folder that it has, or will have once `wait` returns.

        Raises:
            CheckpointError: it, or the one still being written, could not be written; earlier ones are untouched.
        """
        self.wait()
        target = self.folder / checkpoint_name(trainer_state["step"])
        unfinished = target.with_name(target.name + UNFINISHED)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        small_files = self._small_files(model, trainer_state)
        try:
            self._together(lambda: self._make_folder(unfinished))
            state = {"model": model_state, "optimizer": optimizer_state}
            upload = dcp.async_save(state, checkpoint_id=unfinished, process_group=self.group)
        except (OSError, RuntimeError) as error:
            raise self._failure(target, error) from error
        self._in_flight = self._writer.submit(self._complete, upload, small_files, unfinished, target)
        self._told = False
        if not self.asynchronous:
            self.wait()
        return target

    def wait(self) -> None:
        """Return once nothing is being written any more.

        Raises:
            CheckpointError: the checkpoint in flight could not be written.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def failure(self) -> CheckpointError | None:
        """What went wrong with the checkpoint in flight, told once; `wait` will raise it."""
        failed = self._in_flight is not None and self._in_flight.done() and not self._told
        self._told |= failed
        return self._in_flight.exception() if failed else None

    def close(self) -> None:
        """End the thread after what it still writes; errors were `wait`'s to raise."""
        self._writer.shutdown()
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Restore model, optimizer and random states in place.

        Returns:
            dict: the trainer's state.

        Raises:
            ValueError: a file is missing or corrupted, or the checkpoint is of a model of another shape.
        """
        rank = self.accelerator.process_index
        try:
            self._together(lambda: verify_checkpoint(path, rank, self.accelerator.num_processes))
        except RuntimeError as error:  # met by another rank
            raise ValueError(str(error)) from error
        model_state, optimizer_state = get_state_dict(model, optimizer)
        _check_shapes(path, model_state)
        try:
            dcp.load(
                {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path, process_group=self.group
            )
        except CheckpointException as error:
            raise ValueError(f"{path} cannot be read: {_reasons(error)}") from error
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        own_random_state = path / f"random_{rank}.pt"
        if own_random_state.is_file():  # absent when there are more ranks than before
            restore_random_state(torch.load(own_random_state, weights_only=True))
        return torch.load(path / TRAINER_STATE, weights_only=True)

    def _make_folder(self, unfinished: Path) -> None:
        if self.accelerator.is_main_process:
            remove_unfinished(self.folder)
            unfinished.mkdir(parents=True)

    def _small_files(self, model: nn.Module, trainer_state: dict) -> dict[str, bytes]:
        """This rank's files besides the shards."""
        files = {f"random_{self.accelerator.process_index}.pt": _serialised(random_state())}
        if self.accelerator.is_main_process:
            files[TRAINER_STATE] = _serialised(trainer_state)
            files[MODEL_CONFIG] = self.accelerator.unwrap_model(model).config.to_json_string(use_diff=False).encode()
        return files

    def _complete(self, upload: Future, small_files: dict[str, bytes], unfinished: Path, target: Path) -> None:
        """In the thread: bring all of a checkpoint to the disk, then give it its name."""
        try:
            checksums = self._together(lambda: self._finish_files(upload, small_files, unfinished))
            self._together(lambda: self._publish(checksums, unfinished, target))
        except (OSError, RuntimeError) as error:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs the room
            raise self._failure(target, error) from error

    def _finish_files(self, upload: Future, small_files: dict[str, bytes], folder: Path) -> dict[str, str]:
        """Returns the checksums of this rank's files, which are then on the disk."""
        try:
            upload.result()
        except CheckpointException as error:  # no Exception, but a BaseException
            raise RuntimeError(_reasons(error)) from error
        for name, content in small_files.items():
            write_synced(folder / name, content)
        own = [*small_files, *(path.name for path in folder.glob(f"__{self.accelerator.process_index}_*"))]
        if self.accelerator.is_main_process:
            own.append(METADATA)
        return {name: file_checksum(folder / name) for name in own}

    def _publish(self, checksums: list[dict[str, str]], unfinished: Path, target: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        merged = {name: checksum for part in checksums for name, checksum in sorted(part.items())}
        write_synced(unfinished / CHECKSUMS, json.dumps(merged, indent=1).encode())
        sync_folder(unfinished)
        if target.exists():
            remove_checkpoint(target)
        os.replace(unfinished, target)
        sync_folder(self.folder)
        prune(self.folder, self.keep_last, self.keep_every_steps)

    def _together(self, work) -> list:
        """Call `work` on all ranks; when it fails on one, all raise. Returns every rank's result."""
        problem, result = None, None
        try:
            result = work()
        except (OSError, ValueError, RuntimeError) as error:
            problem = error
        outcomes = [(str(problem) if problem else None, result)]
        if self.group is not None:
            outcomes *= dist.get_world_size(self.group)
            dist.all_gather_object(outcomes, outcomes[self.accelerator.process_index], group=self.group)
        if problem is not None:
            raise problem
        for rank, (text, _) in enumerate(outcomes):
            if text is not None:
                raise RuntimeError(f"rank {rank}: {text}")
        return [result for _, result in outcomes]

    def _failure(self, target: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {target} could not be written: {error}; the last complete one is {self.latest()}: free "
            "the disk and start the same command again"
        )


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())


def _serialised(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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
