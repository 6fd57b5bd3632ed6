"""Names and files of checkpoints: which are complete, whether they are whole, and how bytes get to the disk for good.

A folder `step_00000100/` holds model and optimizer as torch.distributed.checkpoint shards, `config.json` of the model,
`trainer_state.pt` (step, data position, counters), one `random_<rank>.pt` a rank, and `checksums.json` over all of it.
"""

import json
import os
import re
import shutil
from pathlib import Path

from trainer.data.shards import file_checksum

PREFIX = "step_"
NAME = re.compile(rf"{PREFIX}\d{{8,}}")
UNFINISHED = ".tmp"
CHECKSUMS = "checksums.json"
METADATA = ".metadata"
TRAINER_STATE = "trainer_state.pt"
MODEL_CONFIG = "config.json"


def checkpoint_name(step: int) -> str:
    """Folder of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; copies under other names are left alone."""
    paths = (path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and NAME.fullmatch(path.name))
    return sorted(paths, key=checkpoint_step)


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted writes and deletions left."""
    for path in folder.glob(f"{PREFIX}*{UNFINISHED}"):
        shutil.rmtree(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; interrupted half-way, it no longer counts as complete."""
    doomed = path.with_name(path.name + ".old" + UNFINISHED)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def prune(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    """Delete all checkpoints but the newest `keep_last` and those of every `keep_every_steps`-th step (0: none).

    A checkpoint that was put off because the loss was high counts for the step it was due at: the first one since.
    """
    before = 0
    for path in complete_checkpoints(folder)[:-keep_last]:
        period = checkpoint_step(path) // keep_every_steps if keep_every_steps else 0
        if period == before:
            remove_checkpoint(path)
        before = period


def verify_checkpoint(path: Path, rank: int = 0, num_ranks: int = 1) -> None:
    """Compare every file of a checkpoint with its checksum.

    Args:
        path: of the checkpoint.
        rank, num_ranks: check only every `num_ranks`-th file, so that ranks share the reading.

    Raises:
        ValueError: a file is missing or corrupted; it is named.
    """
    mend = f"delete {path} to go on from the one before"
    if not (path / CHECKSUMS).is_file():
        if NAME.fullmatch(path.name):
            raise ValueError(f"{path} is no checkpoint of this trainer, or lost its {CHECKSUMS}: if it is one, {mend}")
        raise ValueError(
            f"{path} is no checkpoint of this trainer: give a folder {PREFIX}00001000 of a run's checkpoints"
        )
    try:
        checksums = json.loads((path / CHECKSUMS).read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint file {path / CHECKSUMS} is corrupted ({error}): {mend}") from error
    needed = {METADATA, TRAINER_STATE, MODEL_CONFIG, *(file.name for file in path.glob("*.distcp"))}
    needed |= {file.name for file in path.glob("random_*.pt")}
    if not isinstance(checksums, dict) or not needed <= checksums.keys():
        unlisted = sorted(needed.difference(checksums if isinstance(checksums, dict) else ()))
        raise ValueError(f"checkpoint file {path / CHECKSUMS} is corrupted (it lacks {unlisted}): {mend}")
    for name in sorted(checksums)[rank::num_ranks]:
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint file {file} is lost: {mend}")
        if file_checksum(file) != checksums[name]:
            raise ValueError(f"checkpoint file {file} is corrupted: {mend}")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
