"""After a stage: the same evaluation before and after, row by row, in a table that grows from stage to stage."""

import json
from pathlib import Path

from eval_harness.compare import compare
from eval_harness.evaluate import RESULTS_FILE, evaluate
from eval_harness.statistics import PairedDifference
from sft.config import SftStageConfig

TABLE_FILE = "table.json"
# Metrics of which less is better; of all others, more is.
LESS_IS_BETTER = ("perplexity", "bits_per_byte", "loss")


def evaluate_stage(config: SftStageConfig) -> str:
    """Evaluate the model that a finished stage started from and the one it made, and extend the table.

    A stage that started from another stage's `model/` takes that stage's scores and the rows of its table.

    Args:
        config: a finished stage with `eval_tasks`.

    Returns:
        str: the table so far, as Markdown, with one plain sentence a metric that this stage made worse.

    Raises:
        ValueError: an unknown task, or the folder already holds an evaluation.
    """
    folder = Path(config.output_dir) / "evaluation"
    previous = Path(config.model_name_or_path).parent / "evaluation"
    before, rows = folder / "before", []
    if (previous / "after" / RESULTS_FILE).exists() and Path(config.model_name_or_path).name == "model":
        before = previous / "after"
        rows = json.loads((previous / TABLE_FILE).read_text(encoding="utf-8"))
    else:
        _evaluate(config, config.model_name_or_path, before)
    _evaluate(config, str(Path(config.output_dir) / "model"), folder / "after")
    rows += table_rows(Path(config.output_dir).name, compare(before, folder / "after"), before, folder / "after")
    (folder / TABLE_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = render_table(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def _evaluate(config: SftStageConfig, model: str, folder: Path) -> None:
    """The chat template is applied on both sides, so that only the weights differ."""
    from sft.stage import load_tokenizer

    evaluate(
        model,
        load_tokenizer(model),
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
