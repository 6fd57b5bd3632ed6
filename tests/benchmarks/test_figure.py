"""The README's figure: every bar stands on one row of a result file, and the README says what it shows."""

import re
from pathlib import Path

import pytest

from benchmarks.figure import PANELS, Source, attention, main, optimizer, training

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: re.split("[:,]", panel.title)[0])
def test_our_bar_is_the_shortest_of_its_panel(panel):
    ours, *others = (source.value() for source in panel.bars.values())
    assert 0 < ours < min(others)


def test_the_readme_says_what_the_figure_shows():
    text = README.read_text()
    assert f"**{optimizer('Gram, chunk 1').value():.1f} ms**" in text
    assert f"**{attention('ours').value():.1f} ms**" in text
    tokens_per_second = round(1e6 / training("step", "Motif-2", "e6c55f7").value(), -2)
    assert f"**{tokens_per_second:,.0f} tokens/s**" in text


def test_a_row_that_is_missing_or_there_twice_is_named(tmp_path):
    (tmp_path / "times.csv").write_text("row,ms\none,1\none,2\n")
    for row in ("one", "two"):
        with pytest.raises(ValueError, match=f"times.csv: . rows with .*{row}"):
            Source("times.csv", "ms", ({"row": row},)).value(tmp_path)


def test_the_picture_is_drawn(tmp_path, capsys):
    picture = tmp_path / "measured.png"
    assert main(["--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
