"""A self-contained page on a pruning: how much went for which reason, group by group, with samples of both sides."""

import html
from collections import Counter, defaultdict
from collections.abc import Sequence

from sft.filters import message_text

SAMPLES = 5
LIMIT_CHARACTERS = 1500
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .75rem; text-align: left; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; } td.n { text-align: right; }
.bar { background: #eee; width: 14rem; height: .8rem; } .bar div { background: #2a7; height: 100%; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; border-left: 4px solid #c44; }
pre.kept { border-color: #2a7; } summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
"""


def render_page(rows: Sequence[dict], decisions: Sequence, malformed: Sequence[tuple[str, str]] = ()) -> str:
    """The page as HTML; texts of the rows are escaped.

    Args:
        rows: conversations.
        decisions: `sft.prune.Decision`, one a row.
        malformed: place and problem of rows that could not be read as conversations.
    """
    kept = sum(decision.kept for decision in decisions)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for index, decision in enumerate(decisions):
        by_kind[reason_kind(decision.reason)].append(index)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>What was pruned</title>",
        f"<style>{STYLE}</style></head><body><h1>What was pruned</h1>",
        f"<p>{kept:,} of {len(rows):,} conversations stay.</p>",
        _reason_table(by_kind, decisions),
        _group_table(decisions),
        _malformed_table(malformed),
    ]
    for kind, members in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        parts.append(f"<details><summary>{html.escape(kind)}: {len(members):,}</summary>")
        parts += [_sample(rows[index], decisions[index]) for index in members[:SAMPLES]]
        parts.append("</details>")
    return "\n".join([*parts, "</body></html>\n"])


def reason_kind(reason: str) -> str:
    """The reason without what is particular to one row."""
    return reason.partition(":")[0].partition(" of ")[0].partition(" as ")[0]


def _reason_table(by_kind: dict[str, list[int]], decisions: Sequence) -> str:
    lines = ["<h2>By reason</h2><table><tr><th>reason</th><th>rows</th><th>stays</th></tr>"]
    for kind, members in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        stays = "yes" if decisions[members[0]].kept else "no"
        lines.append(f"<tr><td>{html.escape(kind)}</td><td class='n'>{len(members):,}</td><td>{stays}</td></tr>")
    return "".join([*lines, "</table>"])


def _malformed_table(malformed: Sequence[tuple[str, str]]) -> str:
    if not malformed:
        return ""
    lines = ["<h2>Malformed rows, not read</h2><table><tr><th>problem</th><th>rows</th><th>first</th></tr>"]
    for problem, count in Counter(problem for _, problem in malformed).most_common():
        places = [place for place, own in malformed if own == problem][:SAMPLES]
        lines.append(
            f"<tr><td>{html.escape(problem)}</td><td class='n'>{count:,}</td>"
            f"<td>{html.escape(', '.join(places))}</td></tr>"
        )
    return "".join([*lines, "</table>"])


def _group_table(decisions: Sequence) -> str:
    before, after = Counter(), Counter()
    for decision in decisions:
        group = (decision.domain, decision.skill)
        before[group] += 1
        after[group] += decision.kept
    lines = [
        "<h2>By domain and skill</h2>",
        "<table><tr><th>domain</th><th>skill</th><th>before</th><th>after</th><th></th></tr>",
    ]
    for group, count in before.most_common():
        share = 100 * after[group] / count
        domain, skill = map(html.escape, group)
        lines.append(
            f"<tr><td>{domain}</td><td>{skill}</td><td class='n'>{count:,}</td><td class='n'>{after[group]:,}</td>"
            f"<td><div class='bar'><div style='width:{share:.0f}%'></div></div></td></tr>"
        )
    return "".join([*lines, "</table>"])


def _sample(row: dict, decision) -> str:
    measured = "" if decision.utility is None else f" (loss {decision.loss:.3f}, utility {decision.utility:.3f})"
    text = "\n\n".join(f"{turn['role']}: {message_text(turn)}" for turn in row["messages"])[:LIMIT_CHARACTERS]
    kind = " class='kept'" if decision.kept else ""
    caption = html.escape(f"{decision.place}: {decision.reason}{measured}")
    return f"<p>{caption}</p><pre{kind}>{html.escape(text)}</pre>"
