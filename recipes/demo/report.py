"""The demo's page: what was measured and the pictures, in one self-contained HTML file."""

import base64
import html
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2329; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .note { color: #5f6b76; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .9rem; text-align: right; }
th { border-bottom: 2px solid #1d2329; } td { border-bottom: 1px solid #e6e8eb; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; display: block; margin: 1rem 0; }
pre { background: #f5f6f8; padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap; }
"""

_NOTE = (
    "Held-out columns are bits per byte of text never trained on: lower is better. Arithmetic is the share of right "
    "answers on sums whose operands were never trained on, ± one standard error; the first two rows are asked as "
    "plain text, the stages through the chat template."
)


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    table: list[list[str]],
    conversations: list[tuple[str, str]],
    pictures: list[tuple[str, Path]],
    facts: dict[str, str],
) -> Path:
    """Write the page.

    Args:
        path: HTML file to write.
        title: heading.
        summary: one paragraph of plain text.
        table: rows of cells, the header first.
        conversations: (prompt, answer) pairs of the final model.
        pictures: (caption, PNG file) in reading order; embedded.
        facts: what the numbers depend on (versions, seed, sizes, seconds).
    """
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>",
        "<h2>Scores after every stage</h2>",
        _table(table),
        f'<p class="note">{_NOTE}</p>',
        "<h2>The final model answers</h2>",
        *(f"<pre><b>{html.escape(prompt)}</b>\n{html.escape(answer)}</pre>" for prompt, answer in conversations),
        *(_figure(caption, picture) for caption, picture in pictures),
        "<h2>How it was made</h2>",
        _table([["setting", "value"], *([name, value] for name, value in facts.items())]),
        "</html>",
    ]
    path.write_text("\n".join(parts))
    return path


def text_table(rows: list[list[str]]) -> str:
    """The same table for the terminal, columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(caption: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    caption = html.escape(caption)
    return f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">'
