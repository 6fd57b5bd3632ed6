"""Draw the README's figure, `docs/measured.png`, from the results that are in the repository.

    python benchmarks/figure.py

Every bar is the median of one row of a file in `benchmarks/results/`, or the sum of two (forward and backward).
"""

import argparse
import csv
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
OURS, OTHERS = "#0072b2", "#b8bec6"


@dataclass(frozen=True)
class Panel:
    """One panel of bars, ours first; the shorter a bar the better.

    Args:
        title: what was measured, and its unit.
        bars: where each bar's value comes from, by label.
    """

    title: str
    bars: dict[str, "Source"]


@dataclass(frozen=True)
class Source:
    """Rows of a result file whose values add up to a bar.

    Args:
        file: its name in `benchmarks/results`.
        column: of the value.
        rows: what the columns of one row say, for every row that is added.
        scale: what the sum is divided by.
    """

    file: str
    column: str
    rows: tuple[Mapping[str, str], ...]
    scale: float = 1.0

    def value(self, folder: Path = RESULTS) -> float:
        """The bar's length.

        Raises:
            ValueError: a row is not there, or is there twice.
        """
        with (folder / self.file).open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        total = 0.0
        for row in self.rows:
            found = [line for line in lines if row.items() <= line.items()]
            if len(found) != 1:
                raise ValueError(f"{self.file}: {len(found)} rows with {dict(row)}, but a bar needs one")
            total += float(found[0][self.column])
        return total / self.scale


def optimizer(row: str, file: str = "parallel_muonclip_x2_l10.csv", column: str = "ms") -> Source:
    return Source(file, column, ({"row": row},))


def attention(name: str) -> Source:
    row = {"section": "operator", "name": name, "shape": "B1 T16384", "device": H100}
    return Source("gda_attention.csv", "value", tuple(row | {"direction": way} for way in ("forward", "backward")))


def polynorm(name: str) -> Source:
    row = {"section": "operator", "name": name, "shape": "T8192 plain", "direction": "backward", "device": H100}
    return Source("polynorm.csv", "ms", (row,))


def training(section: str, row: str, commit: str) -> Source:
    """Seconds of a million tokens: a step has 40,960."""
    match = {"section": section, "row": row, "device": H100, "commit": commit, "tokens_a_step": "40960"}
    return Source("train_step.csv", "seconds", (match,), scale=0.04096)


def decoding(section: str, name: str, shape: str, device: str, commit: str) -> Source:
    row = {"section": section, "name": name, "shape": shape, "direction": "step", "device": device, "commit": commit}
    return Source("decode.csv", "value", (row,))


PANELS = (
    Panel(
        "MuonClip step of a rank's share of 12.7B: ms, 2 x H200",
        {
            "motif2": optimizer("Gram, chunk 1"),
            "dion": optimizer("dion Muon, Triton", "parallel_muonclip_x2_l10_dion.csv"),
            "the report, 8 x H200": optimizer(
                "Parallel, pipelined, balanced", "parallel_muonclip_x8_l40.csv", "reported_ms"
            ),
            "torch.optim.Muon": optimizer("torch.optim.Muon, whole share"),
            "muon-fsdp2": optimizer("muon-fsdp2"),
            "dtensor-muon": optimizer("dtensor-muon, Muon"),
        },
    ),
    Panel(
        "attention and its backward, 16,384 tokens: ms, H100",
        {
            "motif2": attention("ours"),
            "FlashAttention-4 x 4, compiled": attention("flash-attn-4 x4, compiled"),
            "cuDNN x 4, compiled": attention("sdpa cudnn x4, compiled"),
            "FlashAttention-4 x 4": attention("flash-attn-4 x4"),
            "cuDNN x 4": attention("sdpa cudnn x4"),
        },
    ),
    Panel(
        "training 1.5B parameters, a million tokens: s, H100",
        {
            "motif2, MuonClip": training("step", "Motif-2", "e6c55f7"),
            "Llama, Trainer, AdamW": training("peer", "Llama by transformers' Trainer", "bc3501d"),
            "DiffLlama, Trainer, AdamW": training("peer", "DiffLlama by transformers' Trainer", "bc3501d"),
            "Motif-2, Trainer, AdamW": training("peer", "Motif2 by transformers' Trainer", "bc3501d"),
        },
    ),
    Panel(
        "a token of the 12.7B, batch 1: ms, H100",
        {
            "motif2, generate": decoding("generate", "products, late stop, every guard", "B1 S1024", H100, "13f96f5"),
            "a captured step, cuBLAS": decoding("cublas", "cublas compiled", "B1 S1024", H100, "bc3501d"),
            "without late stop": decoding("generate", "products, every guard", "B1 S1024", H100, "13f96f5"),
            "eager": decoding("full_size", "sdpa", "B1 S1024", H100, "dc3c512"),
        },
    ),
    Panel(
        "PolyNorm's backward, 8,192 tokens: ms, H100",
        {"motif2": polynorm("ours"), "Liger": polynorm("liger"), "torch.compile": polynorm("torch.compile")},
    ),
    Panel(
        "a token of 1.5B, 8 rows after 16,384 tokens: ms, H200",
        {
            "motif2": decoding("models", "motif2 gda_kernel", "B8 S16384", H200, "0c62b52"),
            "Llama": decoding("models", "llama sdpa", "B8 S16384", H200, "0c62b52"),
            "DiffLlama": decoding("models", "diffllama sdpa", "B8 S16384", H200, "0c62b52"),
        },
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "measured.png", help="the picture to write")
    arguments = parser.parse_args(argv)
    draw(arguments.output)
    print(arguments.output)
    return 0


def draw(picture: Path) -> None:
    """All panels in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [PANELS[i : i + 2] for i in range(0, len(PANELS), 2)]
    most = [max(len(panel.bars) for panel in row) for row in rows]
    size, heights = (12, 0.5 * sum(most)), {"height_ratios": most}
    figure, panels = plt.subplots(len(rows), 2, figsize=size, layout="constrained", gridspec_kw=heights)
    for number, (axes, panel) in enumerate(zip(panels.flat, PANELS, strict=True)):
        labels, values = list(panel.bars), [source.value() for source in panel.bars.values()]
        colors = [OURS] + [OTHERS] * (len(values) - 1)
        bars = axes.barh(labels, values, color=colors, height=0.7)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=4, fontsize=9)
        axes.set_ylim(most[number // 2] - 0.5, -0.5)  # ours on top, bars of one width
        axes.set_xlim(0, 1.12 * max(values))
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_title(panel.title, fontsize=10, loc="left", pad=8)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
