"""Checkpoints that are whole or passed over, and the folder of a run that is new, finished or to be gone on with.

transformers writes a checkpoint file by file under its final name. `seal` lists the files and their sizes once all
ranks are done, so that one that was cut short (a kill, a full disk) is known by its missing or wrong list.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

SEAL_FILE = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Declare a checkpoint complete: write the list of its files with their sizes, in bytes."""
    unfinished = folder / f"{SEAL_FILE}.partial"
    unfinished.unlink(missing_ok=True)  # left by a disk that was full
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
    }
    unfinished.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / SEAL_FILE)


def unseal(folder: Path) -> None:
    """Take the list away from a checkpoint that is about to be written again."""
    (folder / SEAL_FILE).unlink(missing_ok=True)


def defect(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None."""
    try:
        sizes = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {SEAL_FILE}, its writing was cut short"
    except ValueError as error:
        return f"{SEAL_FILE} cannot be read ({error})"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in a folder, and for each newer one why it is passed over."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    passed_over = []
    for _, path in sorted(found, reverse=True):
        problem = defect(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path.name}: {problem}")
    return None, passed_over


def claim_output_dir(output_dir: str | Path, resume: bool) -> tuple[Path | None, list[str]]:
    """Refuse a folder with a run in it, unless the run is to go on; make the folder.

    Args:
        output_dir: folder of the run: `model/` when it has ended, `metrics.jsonl` once it has started, `checkpoints/`.
        resume: go on from the newest complete checkpoint.

    Returns:
        tuple: that checkpoint (None: start anew), and one line for each newer one that was passed over.

    Raises:
        ValueError: the folder holds a finished or an unfinished run, cannot be made, or holds no complete checkpoint.
    """
    folder = Path(output_dir)
    if (folder / "model").exists():
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds a finished run; choose another folder, or remove this one"
        )
    newest, passed_over = newest_complete(folder / "checkpoints")
    if resume and newest is None:
        reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise ValueError(
            f"resume is set, but {str(folder / 'checkpoints')!r} holds no complete checkpoint{reasons}; set resume: "
            "false and an empty output_dir to start anew"
        )
    if not resume and (folder / "metrics.jsonl").exists():
        go_on = "set resume: true to go on from its last checkpoint, " if newest else "it left no checkpoint; "
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds an unfinished run; {go_on}choose another folder, or remove this one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir {str(output_dir)!r} cannot be made: {error.strerror}; choose another folder"
        ) from error
    return newest if resume else None, passed_over if resume else []


@dataclass(frozen=True)
class ResumeRules:
    """What may differ between a run and its continuation; everything else must be as it was.

    Args:
        applied: settings of the coming updates: a new value counts from here on.
        free: settings that change no update.
    """

    applied: frozenset[str]
    free: frozenset[str]


def changed_settings(config: Any, recipe: Path, rules: ResumeRules) -> list[str]:
    """Compare the settings of a continuation with those that the run was started with.

    Args:
        config: a dataclass of settings.
        recipe: the run's `config.yaml`.
        rules: what may differ.

    Returns:
        list[str]: one line for each setting that counts from here on with another value.

    Raises:
        ValueError: settings differ that the updates already made depend on; all are named.
    """
    if not recipe.is_file():
        return []
    before, now = yaml.safe_load(recipe.read_text(encoding="utf-8")), asdict(config)
    changed = [name for name in now if name in before and before[name] != now[name] and name not in rules.free]
    told = {name: f"{name} is {now[name]!r} and was {before[name]!r}" for name in changed}
    refused = [told[name] for name in changed if name not in rules.applied]
    if refused:
        raise ValueError(
            f"resume goes on with the same settings, but {'; '.join(refused)}: set them back, or start a new run in "
            f"another output_dir; what may change is {', '.join(sorted(rules.applied))}"
        )
    return [told[name] for name in changed]
