"""The card of a prepared data set: counts, licences, and what was dropped for which reason, as JSON and as a page."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import yaml

from sft.files import write_text


def data_card(prepared) -> dict:
    """Counts of a prepared data set.

    Args:
        prepared: `sft.prepare.Prepared`, or anything with `rows`, `num_tokens`, `dropped` and `report`.

    Returns:
        dict: rows and tokens in all, by domain, source, licence and origin; rows dropped by reason and by source.
    """
    card: dict = {"rows": len(prepared.rows), "tokens": sum(prepared.num_tokens)}
    for column in ("domain", "source", "license", "origin"):
        rows, tokens = Counter(), Counter()
        for row, count in zip(prepared.rows, prepared.num_tokens, strict=True):
            name = row.get(column) or "unknown"
            rows[name] += 1
            tokens[name] += count
        card[column] = {name: {"rows": rows[name], "tokens": tokens[name]} for name, _ in tokens.most_common()}
    by_source: dict[str, Counter] = defaultdict(Counter)
    for _, row, reason in prepared.dropped:
        by_source[row.get("source") or "unknown"][reason] += 1
    card["dropped"] = dict(prepared.report.dropped.most_common())
    card["dropped_by_source"] = {source: dict(reasons.most_common()) for source, reasons in sorted(by_source.items())}
    return card


def render_data_card(card: dict) -> str:
    """The card as a Markdown page in the form of a Hub data set's README."""
    licenses = {"license": "other", "license_name": " + ".join(sorted(card["license"]))}
    header = yaml.safe_dump(licenses, sort_keys=False, allow_unicode=True, width=math.inf)
    lines = ["---", *header.splitlines(), "---", "", "# Fine-tuning data", ""]
    lines += [f"{card['rows']:,} conversations, {card['tokens']:,} tokens.", ""]
    for column in ("domain", "source", "license", "origin"):
        lines += [f"| {column} | rows | tokens | share of tokens |", "|---|---|---|---|"]
        for name, counts in card[column].items():
            share = counts["tokens"] / max(card["tokens"], 1)
            lines.append(f"| {_cell(name)} | {counts['rows']:,} | {counts['tokens']:,} | {share:.1%} |")
        lines.append("")
    lines += ["| dropped for | rows |", "|---|---|"]
    lines += [f"| {_cell(reason)} | {count:,} |" for reason, count in card["dropped"].items()] or ["| nothing | 0 |"]
    lines += ["", "| source | dropped |", "|---|---|"]
    lines += [
        f"| {_cell(source)} | {', '.join(f'{count:,} {_cell(reason)}' for reason, count in reasons.items())} |"
        for source, reasons in card["dropped_by_source"].items()
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def write_data_card(prepared, folder: Path) -> None:
    """Write `card.json` and `README.md` into a folder."""
    card = data_card(prepared)
    write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", folder / "card.json")
    write_text(render_data_card(card), folder / "README.md")
