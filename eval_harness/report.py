"""Turn a finished run's files into `report.json`, `report.md` and one self-contained `report.html`."""

import html
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from eval_harness.evaluate import RESULTS_FILE, file_name, leaf_tasks
from eval_harness.statistics import standard_error, wilson_interval
from eval_harness.suites import REPORT_MODEL, Row

PACKAGES = ("torch", "transformers", "lm_eval", "math-verify", "datasets")
SHOWN_SAMPLES = 100
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}p.note{color:#5a6675}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #e3e7ec}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.row{display:grid;grid-template-columns:8.5rem 1fr 11rem;gap:.6rem;align-items:center;margin:.18rem 0}
.bar{position:relative;height:.95rem;background:#f0f2f5;border-radius:3px}
.bar i{position:absolute;left:0;top:0;bottom:0;border-radius:3px;background:#b9c3cf}.ours i{background:#2563a8}
.paper i{background:#7fa7cf}
.bar b{position:absolute;top:.1rem;bottom:.1rem;border:solid #0b1526;
border-width:0 2px;filter:drop-shadow(0 0 1px #fff)}
.bar b::after{content:"";position:absolute;left:0;right:0;top:calc(50% - 1px);border-top:2px solid #0b1526}
ul{columns:2;padding-left:1.2rem}details{border:1px solid #e3e7ec;border-radius:4px;margin:.5rem 0;padding:.4rem .7rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f7f9;padding:.6rem;border-radius:4px}
.ok{color:#17703b}.bad{color:#a3262a}
"""


@dataclass(frozen=True)
class Line:
    """One score of the report, in the metric's own unit; shares are given in percent.

    Attributes:
        label, task, metric, shots, prompting: what was measured.
        score: the measured value.
        low, high: 95% confidence interval; both None where none is known.
        rows: problems scored.
        published: model -> published score.
        sources: model -> where that was published.
        note: an assumption, or parts that were left out.
        percent: whether the score is a share.
    """

    label: str
    task: str
    metric: str
    shots: int
    prompting: str
    score: float
    low: float | None
    high: float | None
    rows: int
    published: dict[str, float]
    sources: dict[str, str]
    note: str
    percent: bool


def write_report(folder: str | Path, settings: dict, rows: list[Row]) -> str:
    """Write the three reports and a page of samples a task.

    Args:
        folder: of a finished run.
        settings: of the run, shown as they are.
        rows: of the suite; empty when tasks were named without one.

    Returns:
        str: the Markdown report.
    """
    folder = Path(folder)
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    lines = report_lines(folder, results, rows)
    facts = run_facts(results, settings)
    content = {
        "settings": settings,
        "facts": facts,
        "lines": [asdict(line) for line in lines],
        "skipped": results["skipped"],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    markdown = as_markdown(lines, facts)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    links = {task: write_samples_page(folder, task) for task in sample_tasks(folder)}
    (folder / "report.html").write_text(as_html(lines, facts, settings, links), encoding="utf-8")
    return markdown


def report_lines(folder: Path, results: dict, rows: list[Row]) -> list[Line]:
    """Scores of the suite's rows, or of every task and group where no suite was named."""
    if rows:
        rows = [row for row in rows if row.task in results["metrics"]]
        chosen = [(row, row.task, m) for row in rows for m in _shown_metrics(row, results["metrics"][row.task])]
    else:
        parts = {part for group in results["raw"].get("group_subtasks", {}).values() for part in group}
        chosen = [(None, task, m) for task, values in results["metrics"].items() if task not in parts for m in values]
    return [_line(folder, results, row, task, metric) for row, task, metric in chosen]


def _shown_metrics(row: Row, measured: dict[str, float]) -> list[str]:
    """The row's metric and, where several programs a problem were asked for, pass@k for each further k."""
    return [row.metric, *(name for name in measured if name.startswith("pass@") and name != row.metric)]


def _line(folder: Path, results: dict, row: Row | None, task: str, metric: str) -> Line:
    score = results["metrics"][task][metric]
    values = sample_scores(folder, results, task, metric)
    shots = row.shots if row else int((results["raw"].get("n-shot") or {}).get(task) or 0)
    low = high = None
    percent = bool(values) and all(0 <= value <= 1 for value in values)
    if values and set(values) <= {0.0, 1.0}:
        low, high = wilson_interval(sum(values), len(values))
    elif percent:
        reach = 1.959964 * standard_error(values)
        low, high = max(0.0, score - reach), min(1.0, score + reach)
    scale = 100.0 if percent else 1.0
    skipped = [part for part in results["skipped"] if part.startswith(f"{task}::")]
    notes = [row.assumption] if row and row.assumption else []
    notes += [f"without {', '.join(part.partition('::')[2] for part in skipped)}"] if skipped else []
    return Line(
        label=row.label if row else task,
        task=task,
        metric=metric,
        shots=shots,
        prompting=row.prompting if row else "",
        score=scale * score,
        low=None if low is None else scale * low,
        high=None if high is None else scale * high,
        rows=results["num_samples"].get(task, len(values)),
        published=row.published if row and metric == row.metric else {},
        sources=row.sources if row and metric == row.metric else {},
        note="; ".join(notes),
        percent=percent,
    )


def sample_scores(folder: Path, results: dict, task: str, metric: str) -> list[float]:
    """Scores of a task's rows, or of all rows of a group's parts; none where a row's is no plain number."""
    name, _, chosen = metric.partition(",")
    filters = (chosen,) if chosen else ("none", "answer")
    scores = []
    for part in leaf_tasks(results["raw"].get("group_subtasks", {}), task):
        path = folder / "samples" / f"{file_name(part)}.jsonl"
        for row in map(json.loads, path.open(encoding="utf-8")) if path.exists() else ():
            if row["filter"] in filters and isinstance(row.get(name), float | int):
                scores.append(float(row[name]))
    return scores


def run_facts(results: dict, settings: dict) -> dict[str, str]:
    """What a reader needs to repeat the run and to judge its price."""
    cost = results["cost"]
    hours, tokens = cost["seconds"] * cost["processes"] / 3600, cost["generated_tokens"]
    return {
        "model": settings.get("model", ""),
        "device": f"{cost['device']}, {cost['processes']} process(es)",
        "time": f"{cost['seconds']:.0f} s ({hours:.2f} device hours)",
        "responses": f"{cost['responses']} ({cost['responses_reused']} found on file)",
        "generated tokens": f"{tokens} ({tokens / max(cost['seconds'], 1):.0f} a second)",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        + f", Python {platform.python_version()}",
        "seed": str(settings.get("seed", "")),
    }


def as_markdown(lines: list[Line], facts: dict[str, str]) -> str:
    """The report as a table."""
    peers = list(dict.fromkeys(model for line in lines for model in line.published))
    head = ["benchmark", "shots", "metric", "rows", "score", "95% interval", *peers, "note"]
    table = [head, ["---"] * len(head)]
    for line in lines:
        interval = "" if line.low is None else f"{line.low:.1f} to {line.high:.1f}"
        published = [f"{line.published[model]:g}" if model in line.published else "" for model in peers]
        cells = [
            line.label,
            str(line.shots),
            line.metric,
            str(line.rows),
            f"{line.score:.2f}",
            interval,
            *published,
            line.note,
        ]
        table.append([cell.replace("|", "\\|") for cell in cells])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    sources = sorted({source for line in lines for source in line.sources.values()})
    facts_text = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"{text}\n\n{facts_text}\n" + (f"- published figures: {'; '.join(sources)}\n" if sources else "")


def as_html(lines: list[Line], facts: dict[str, str], settings: dict, links: dict[str, str]) -> str:
    """The report as one page that loads nothing."""
    groups = "".join(_bars(line) for line in lines)
    rows = "".join(
        f"<tr><td>{_safe(line.label)}</td><td class=n>{line.shots}</td><td>{_safe(line.prompting)}</td>"
        f"<td>{_safe(line.metric)}</td><td class=n>{line.rows}</td><td class=n>{line.score:.2f}</td>"
        f"<td class=n>{_interval(line)}</td><td class=n>{line.published.get(REPORT_MODEL, '')}</td>"
        f"<td>{_safe(line.note)}</td></tr>"
        for line in lines
    )
    facts_rows = "".join(f"<tr><th>{_safe(name)}</th><td>{_safe(value)}</td></tr>" for name, value in facts.items())
    sources = sorted({source for line in lines for source in line.sources.values()})
    samples = "".join(f'<li><a href="{_safe(link)}">{_safe(task)}</a></li>' for task, link in links.items())
    shown = "".join(
        f"<tr><th>{_safe(k)}</th><td>{_safe(str(v))}</td></tr>" for k, v in settings.items() if v not in ("", None)
    )
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>Evaluation of {_safe(facts['model'])}</title><style>{STYLE}</style>"
        f"<h1>Evaluation of {_safe(facts['model'])}</h1>"
        "<p class=note>Bars: dark, measured here, with its 95% interval; light, the report; grey, its peers.</p>"
        "<table><tr><th>benchmark<th class=n>shots<th>prompting<th>metric<th class=n>rows<th class=n>score"
        f"<th class=n>95% interval<th class=n>report<th>note</tr>{rows}</table>{groups}"
        f"<h2>Run</h2><table>{facts_rows}</table><h2>Samples</h2><ul>{samples}</ul>"
        f"<h2>Settings</h2><table>{shown}</table>"
        + (f"<p class=note>Published figures: {_safe('; '.join(sources))}.</p>" if sources else "")
        + "</html>"
    )


def _bars(line: Line) -> str:
    if not line.percent:
        return ""
    whisker = ""
    if line.low is not None:
        whisker = f'<b style="left:{line.low:.2f}%;width:calc({line.high - line.low:.2f}% - 4px)"></b>'
    bars = [
        f'<div class="row ours"><span>here</span><div class=bar><i style="width:{line.score:.2f}%"></i>{whisker}</div>'
    ]
    bars.append(f"<span>{line.score:.1f} ({_interval(line)})</span></div>")
    for model, score in line.published.items():
        kind = "paper" if model == REPORT_MODEL else "peer"
        bars.append(
            f'<div class="row {kind}"><span>{_safe(model)}</span>'
            f'<div class=bar><i style="width:{score:.2f}%"></i></div><span>{score:g}</span></div>'
        )
    return f"<h2>{_safe(line.label)}, {line.shots}-shot, {_safe(line.metric)}</h2>{''.join(bars)}"


def sample_tasks(folder: Path) -> list[str]:
    """Names of the files under `samples/`."""
    return sorted(path.stem for path in (folder / "samples").glob("*.jsonl"))


def write_samples_page(folder: Path, task: str) -> str:
    """Write `samples/<task>.html`: the first rows with prompt, response and score. Returns its link."""
    blocks = []
    for line in (folder / "samples" / f"{task}.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        if row["filter"] not in ("none", "answer"):
            continue
        scores = {name: row[name] for name in row["metrics"]}
        good = all(value == 1 for value in scores.values() if isinstance(value, float | int))
        shown = ", ".join(f"{name} {value}" for name, value in scores.items())
        prompt = row["arguments"][0][0] if row["arguments"] else ""
        blocks.append(
            f"<details><summary class={'ok' if good else 'bad'}>row {row['doc_id']}: {_safe(shown)}</summary>"
            f"<h3>Prompt</h3><pre>{_safe(str(prompt))}</pre><h3>Response</h3><pre>{_safe(_readable(row['resps']))}</pre>"
            f"<h3>Read as</h3><pre>{_safe(_readable(row['filtered_resps']))}</pre>"
            f"<h3>Reference</h3><pre>{_safe(str(row['target']))}</pre></details>"
        )
        if len(blocks) == SHOWN_SAMPLES:
            break
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Samples of {_safe(task)}</title>"
        f"<style>{STYLE}</style><h1>Samples of {_safe(task)}</h1>"
        f"<p class=note>The first {len(blocks)} rows; all are in {_safe(task)}.jsonl. "
        f'<a href="../report.html">Report</a></p>{"".join(blocks)}</html>'
    )
    (folder / "samples" / f"{task}.html").write_text(page, encoding="utf-8")
    return f"samples/{task}.html"


def _readable(value: object) -> str:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _interval(line: Line) -> str:
    return "" if line.low is None else f"{line.low:.1f} to {line.high:.1f}"


def _safe(text: str) -> str:
    return html.escape(str(text), quote=True)
