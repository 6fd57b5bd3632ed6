"""The card of a prepared data set: counts, licences, and what was dropped for which reason, as JSON and as a page."""

import json
from collections import Counter, defaultdict
from pathlib import Path


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
    licenses = sorted(card["license"])
    lines = ["---", "license: other", f"license_name: {' + '.join(licenses)}", "---", "", "# Fine-tuning data", ""]
    lines += [f"{card['rows']:,} conversations, {card['tokens']:,} tokens.", ""]
    for column in ("domain", "source", "license", "origin"):
        lines += [f"| {column} | rows | tokens | share of tokens |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {counts['rows']:,} | {counts['tokens']:,} | {counts['tokens'] / max(card['tokens'], 1):.1%} |"
            for name, counts in card[column].items()
        ]
        lines.append("")
    lines += ["| dropped for | rows |", "|---|---|"]
    lines += [f"| {reason} | {count:,} |" for reason, count in card["dropped"].items()] or ["| nothing | 0 |"]
    lines += ["", "| source | dropped |", "|---|---|"]
    lines += [
        f"| {source} | {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())} |"
        for source, reasons in card["dropped_by_source"].items()
    ]
    return "\n".join(lines) + "\n"


def write_data_card(prepared, folder: Path) -> None:
    """Write `card.json` and `README.md` into a folder."""
    card = data_card(prepared)
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render_data_card(card), encoding="utf-8")
