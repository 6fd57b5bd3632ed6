"""Parents to grow, and short ways to grow them, that the tests of growth share."""

import json
from pathlib import Path

import torch

from modeling_motif2.growth import GrowthOptions
from tests.modeling_motif2.builders import small_model

EVERYTHING = {"width": 2, "signal_ratio": 4, "insert_every": 2, "noise_snr_db": 20.0}
# Small enough for several files; one tensor may be larger.
SEVERAL_FILES = {"max_shard_gb": 2e-4}


def save_parent(folder: Path, dtype: torch.dtype = torch.float64, official: bool = False, **overrides):
    settings = {"ratio": 1, "num_noise_heads": None, "layers": 4, "tie_word_embeddings": True, "vocab_size": 300}
    model = small_model(dtype=dtype, **(settings | overrides))
    model.save_pretrained(folder)
    if official:
        for file in folder.glob("*.py"):
            file.unlink()
        written = model.config.to_official_dict() | {
            "torch_dtype": str(dtype).removeprefix("torch."),
            "auto_map": {"AutoModelForCausalLM": "modeling_motif.MotifForCausalLM"},
            "expanded": True,
        }
        (folder / "config.json").write_text(json.dumps(written))
        (folder / "modeling_motif.py").write_text("raise RuntimeError('remote code of another model')\n")
    return folder, model


def options(parent, output, **settings) -> GrowthOptions:
    return GrowthOptions(source=str(parent), output=str(output), **settings)


def command(parent, output, *arguments: str) -> list[str]:
    """A command line that grows wider."""
    return ["--source", str(parent), "--output", str(output), "--width", "2", *arguments]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
