"""Files that are there whole or not at all, so that no stage reads what another one was still writing."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

TRAIN_FILE = "train.jsonl"


def new_train_file(output_dir: str | Path, held: str) -> Path:
    """The file of conversations that a step of the data work writes last.

    Args:
        output_dir: folder of the step.
        held: what a folder holds that has the file already, for the message.

    Raises:
        ValueError: the file is there.
    """
    train_file = Path(output_dir) / TRAIN_FILE
    if train_file.exists():
        raise ValueError(f"output_dir {str(output_dir)!r} holds {held}; choose another folder, or remove this one")
    return train_file


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Open a text file for writing; it takes its name when it is complete, and leaves nothing behind if it fails.

    Args:
        path: the file; its folder is made, and what it held before stays until the new text is on the disk.

    Raises:
        OSError: the text cannot be written; the message names the file.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, f"{str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_lines(rows: Iterable[object], path: str | Path) -> None:
    """Write JSON lines, whole or not at all; dates and the like, which JSON lacks, become text."""
    with whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
