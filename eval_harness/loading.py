"""Find and build tasks: ours by name, lm-eval's on demand, with every bad name or missing row explained."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval_harness.data import MissingDataset, load_benchmark

TASKS_DIR = Path(__file__).with_name("tasks")
OUR_PREFIX = "motif2_"


def load_tasks(
    names: Sequence[str],
    data_dir: str | Path | None = None,
    apply_chat_template: bool = False,
    skip_missing: bool = False,
    shots: dict[str, int] | None = None,
    generation: dict[str, dict] | None = None,
    repeats: int = 1,
) -> tuple[TaskManager, list[Task | Group], list[str]]:
    """Build tasks by name, with their rows.

    Args:
        names: our tasks and groups, one part of a group (`motif2_math_4shot::algebra`), or lm-eval's own (indexing
            those takes seconds, so only when one is asked for).
        data_dir: local folder with the rows; None reads from the hub.
        apply_chat_template: use a task's `chat_prompt` (in its metadata) instead of its raw prompt where it has one.
        skip_missing: leave out those parts of a group whose rows are missing, instead of refusing.
        shots: worked examples for lm-eval's tasks and groups by name; ours state their own.
        generation: changes to the generation settings of tasks and groups by name.
        repeats: programs a problem, for tasks that run them.

    Returns:
        tuple: lm-eval's manager, the tasks and groups in order, and the parts that were left out.

    Raises:
        ValueError: no name, or an unknown one; the nearest known one is named.
        MissingDataset: the rows of a task are not where they should be.
        ModuleNotFoundError: one of lm-eval's tasks needs a package that is not installed.
    """
    if not names:
        raise ValueError("no task is named; give at least one")
    metadata = {"data_dir": str(data_dir)} if data_dir is not None else {}
    skipped: list[str] = []
    with quiet_lm_eval():
        manager = _manager_for(names, metadata)
        heads = _narrow_groups(manager, names, metadata, skipped if skip_missing else None)
        loaded = _load(manager, heads)
    if not loaded["tasks"]:
        raise MissingDataset(
            f"no rows are left of {', '.join(names)}: {', '.join(skipped)} are missing from {data_dir}"
        )
    for task in loaded["tasks"].values():
        prompt = (task.config.metadata or {}).get("chat_prompt")
        if apply_chat_template and prompt:
            task.set_config("doc_to_text", prompt)
        if repeats > 1 and (task.config.metadata or {}).get("runs_programs"):
            task.set_config("repeats", repeats)
    for name, number in (shots or {}).items():
        if not name.startswith(OUR_PREFIX):
            for task in _members(loaded, name):
                task.set_config("num_fewshot", number)
    for name, changes in (generation or {}).items():
        for task in _members(loaded, name):
            task.set_config("generation_kwargs", {**(task.config.generation_kwargs or {}), **changes})
    inside = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    nested = {
        child.name for group in loaded["groups"].values() for child in group.get_all_groups() if child is not group
    }
    top = [group for name, group in loaded["groups"].items() if name not in nested]
    return manager, top + [task for name, task in loaded["tasks"].items() if name not in inside], skipped


def count_rows(names: Sequence[str], data_dir: str | Path | None = None, skip_missing: bool = False) -> dict[str, int]:
    """Rows of each task and group; arguments and errors as for `load_tasks`."""
    _, loaded, _ = load_tasks(names, data_dir, skip_missing=skip_missing)
    counts = {}
    for item in loaded:
        members = item.get_all_tasks() if isinstance(item, Group) else [item]
        name = item.name if isinstance(item, Group) else item.task_name
        counts[name] = sum(len(task.eval_docs) for task in members)
    return counts


class quiet_lm_eval:
    """lm-eval reports every step as information or warning; only errors pass while this is open."""

    def __enter__(self):
        self.logger = logging.getLogger("lm_eval")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *error):
        self.logger.setLevel(self.level)


def _manager_for(names: Sequence[str], metadata: dict) -> TaskManager:
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    heads = [name.split("::")[0] for name in names]
    if not all(head in manager.all_tasks or head.startswith(OUR_PREFIX) for head in heads):
        manager = TaskManager(include_path=str(TASKS_DIR), metadata=metadata)
    for head in heads:
        if head not in manager.all_tasks:
            raise ValueError(f"unknown task {head!r}{nearest(head, manager.all_tasks)}")
    return manager


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean …?` for an error message, or nothing."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else ""


def _load(manager: TaskManager, heads: list[str]) -> dict:
    """Build tasks; what goes wrong inside lm-eval's own is named with the mend."""
    try:
        return manager.load(heads)
    except MissingDataset:
        raise
    except ImportError as error:
        raise ModuleNotFoundError(
            f"a task of {', '.join(heads)} needs a package that is not installed ({error}); "
            "lm-eval's extras hold them, for example `pip install lm-eval[ifeval]`"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        theirs = [head for head in heads if not head.startswith(OUR_PREFIX)]
        if not theirs:
            raise
        raise MissingDataset(
            f"the rows of {', '.join(theirs)} could not be read ({error}); lm-eval's own tasks read the hub, not "
            "data_dir: run once where it is reachable, or copy its cache (HF_HOME) here; a gated set also needs "
            "`hf auth login`"
        ) from error


def _members(loaded: dict, name: str) -> list[Task]:
    return loaded["groups"][name].get_all_tasks() if name in loaded["groups"] else [loaded["tasks"][name]]


def _narrow_groups(manager: TaskManager, names: Sequence[str], metadata: dict, skipped: list[str] | None) -> list[str]:
    """Cut our groups in the manager's index down to the parts that are named and, with `skipped`, that have rows.

    Returns:
        list: the tasks and groups to load.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        head, _, part = name.partition("::")
        wanted.setdefault(head, []).extend([part] if part else [])
    for head, chosen in list(wanted.items()):
        entry = manager.task_index[head]
        if not head.startswith(OUR_PREFIX) or head not in manager.all_groups or (not chosen and skipped is None):
            continue
        group = load_yaml(entry.yaml_path)
        parts = {child["task"]: child for child in group["task"]}
        if unknown := [part for part in chosen if part not in parts]:
            raise ValueError(f"{head} has no part {unknown[0]!r}{nearest(unknown[0], list(parts))}")
        kept = [parts[part] for part in chosen or parts]
        if skipped is not None:
            present = [child for child in kept if _rows_exist(child["dataset_kwargs"], metadata)]
            skipped += [f"{head}::{child['task']}" for child in kept if child not in present]
            kept = present
        manager.task_index[head] = replace(entry, yaml_path=None, cfg={**group, "task": kept})
        if not kept:
            del wanted[head]
    return list(wanted)


def _rows_exist(dataset: dict, metadata: dict) -> bool:
    try:
        load_benchmark(**dataset, **metadata)
    except MissingDataset:
        return False
    return True
