"""After a stage: the same evaluation before and after, row by row, in a table that grows from stage to stage."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from lm_eval.api.group import Group
from transformers import AutoModelForCausalLM

from eval_harness.compare import compare
from eval_harness.data import MissingDataset
from eval_harness.evaluate import RESULTS_FILE, evaluate
from eval_harness.loading import load_tasks
from eval_harness.statistics import PairedDifference
from sft.config import SftStageConfig
from sft.files import write_text

TABLE_FILE = "table.json"
SETTINGS_FILE = "settings.json"
# Metrics of which less is better; of all others, more is.
LESS_IS_BETTER = ("perplexity", "bits_per_byte", "loss")


def check_evaluation(config: SftStageConfig) -> dict | None:
    """Find the tasks and read their rows, as before a stage is trained.

    Args:
        config: a stage.

    Returns:
        dict: what two evaluations must share to be compared: tasks with a digest of their rows, limit, precision; None
            without `eval_tasks`.

    Raises:
        ValueError: an unknown task (the nearest is named), rows that are missing, or a package that is.
    """
    if not config.eval_tasks:
        return None
    try:
        _, loaded, _ = load_tasks(config.eval_tasks, config.eval_data_dir or None, apply_chat_template=True)
    except (ValueError, MissingDataset, ModuleNotFoundError) as error:
        raise ValueError(f"eval_tasks and eval_data_dir: {error}") from error
    members = [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]
    rows = {task.task_name: _digest(task.eval_docs) for task in members}
    return {"rows": rows, "limit": config.eval_limit, "dtype": config.dtype}


def _digest(rows: Iterable[dict]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def evaluate_stage(config: SftStageConfig) -> str:
    """Evaluate the model that a finished stage started from and the one it made, and extend the table.

    Scores lie in a folder named by a digest of the tasks, their rows, limit and precision. A stage that started from
    another stage's `model/` takes the rows of that stage's table, and its scores too where they are of the same. An
    evaluation that was interrupted goes on; one of other tasks or limit is added. One process calls this; the others
    of the run need not wait for it.

    Args:
        config: a finished stage with `eval_tasks`.

    Returns:
        str: the table so far, as Markdown, with one plain sentence a metric that this stage made worse.

    Raises:
        ValueError: no task is named, or a task or its rows cannot be found.
    """
    settings = check_evaluation(config)
    if settings is None:
        raise ValueError("eval_tasks is empty; name the tasks to run before and after")
    folder, key = Path(config.output_dir) / "evaluation", _digest([settings])
    before, after, earlier = folder / key / "before", folder / key / "after", []
    if Path(config.model_name_or_path).name == "model":
        previous = Path(config.model_name_or_path).parent / "evaluation"
        earlier = _table(previous)
        if (previous / key / "after" / RESULTS_FILE).is_file():
            before = previous / key / "after"
    write_text(json.dumps(settings, indent=1) + "\n", folder / key / SETTINGS_FILE)
    for model, scores in ((config.model_name_or_path, before), (str(Path(config.output_dir) / "model"), after)):
        if not (scores / RESULTS_FILE).is_file():
            _evaluate(config, model, scores)
    stage = Path(config.output_dir).name
    new = table_rows(stage, compare(before, after), before, after)
    tasks = {row["task"] for row in new}
    own = [row for row in _table(folder) if row["stage"] == stage and row["task"] not in tasks and row not in earlier]
    rows = [*earlier, *own, *new]
    write_text(json.dumps(rows, indent=1) + "\n", folder / TABLE_FILE)
    text = render_table(rows)
    write_text(text, folder / "table.md")
    return text


def _table(folder: Path) -> list[dict]:
    """The rows of an evaluation's table; none where there is no table."""
    file = folder / TABLE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def _evaluate(config: SftStageConfig, name: str, folder: Path) -> None:
    """The chat template is applied on both sides, so that only the weights differ.

    lm-eval gets a loaded model: a name would make it share the rows with every process of the run.
    """
    from sft.stage import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, config.dtype))
    evaluate(
        model.to("cpu" if config.use_cpu else PartialState().device),
        load_tokenizer(name),
        config.eval_tasks,
        data_dir=config.eval_data_dir or None,
        output_dir=folder,
        limit=config.eval_limit or None,
        apply_chat_template=True,
    )


def table_rows(stage: str, found: dict[tuple[str, str], PairedDifference], before: Path, after: Path) -> list[dict]:
    """One row a task and metric: scores before and after, their difference with its interval, and the verdict."""
    first, second = (json.loads((folder / RESULTS_FILE).read_text())["metrics"] for folder in (before, after))
    rows = []
    for (task, metric), paired in found.items():
        row = {"stage": stage, "task": task, "metric": metric, "rows": paired.rows}
        row |= {"before": first.get(task, {}).get(metric), "after": second.get(task, {}).get(metric)}
        row |= {"difference": paired.difference, "low": paired.low, "high": paired.high}
        rows.append(row | {"verdict": verdict(metric, paired)})
    return rows


def verdict(metric: str, paired: PairedDifference) -> str:
    """ "better" or "worse" where the 95% interval leaves out zero, else "no difference shown"."""
    if paired.low <= 0 <= paired.high:
        return "no difference shown"
    more = paired.difference > 0
    return "worse" if more == any(name in metric for name in LESS_IS_BETTER) else "better"


def render_table(rows: list[dict]) -> str:
    """The table as Markdown, and what the last stage made worse in a sentence each."""
    lines = ["| stage | task | metric | rows | before | after | difference | 95% interval | verdict |"]
    lines.append("|" + "---|" * 9)
    for row in rows:
        before, after = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("before", "after"))
        lines.append(
            f"| {row['stage']} | {row['task']} | {row['metric']} | {row['rows']} | {before} | {after} "
            f"| {row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | {row['verdict']} |"
        )
    worse = [row for row in rows if row["verdict"] == "worse" and row["stage"] == rows[-1]["stage"]]
    lines += [f"\n{row['stage']} made the model worse at {row['task']} ({row['metric']})." for row in worse]
    return "\n".join(lines) + "\n"
