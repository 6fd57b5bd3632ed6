"""All pre-training text as shards, for the experiments at larger scale, beside the recall task.

    python benchmarks/sft_stages.py --prepare DATA                  # trains the tokenizer, in .gpu/sft_stages
    python -m benchmarks.experiments.whole_text --prepare DATA      # eight minutes on a CPU, 140 MB in .gpu/whole_text

The tokenizer and the share of documents that is held out are those of the smaller set: what is held out there is held
out here too.
"""

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.experiments.recall import recall_documents
from benchmarks.experiments.recipe import RECALL, ROOT
from benchmarks.sft_stages_data import FULL, TAKEN
from trainer.data.corpus import Source, read_documents
from trainer.data.shards import build_shards
from trainer.model import load_tokenizer

RECALL_TOKENS = 3_000_000  # assumption: no run of a recipe reads more


def make_whole_text(source: Path, tokenizer_folder: Path, folder: Path, recall_tokens: int = RECALL_TOKENS) -> dict:
    """Tokenise every document of every domain.

    Args:
        source: folder that holds `pretrain`.
        tokenizer_folder: of the tokenizer, which is copied.
        folder: gets `tokenizer` and `shards`.
        recall_tokens: length of the recall task.

    Returns:
        dict: the manifest.
    """
    shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    domains = {name: read_documents(Source(str(source / "pretrain" / f"{name}.jsonl.zst"))) for name in TAKEN}
    domains[RECALL] = recall_documents(tokenizer, recall_tokens)
    return build_shards(folder / "shards", domains, tokenizer, heldout_fraction=FULL.heldout_fraction, progress=False)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.whole_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--prepare", type=Path, required=True, metavar="DATA", help="folder that holds pretrain/")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / ".gpu" / "sft_stages" / "tokenizer", metavar="FOLDER")
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu" / "whole_text", help="gets tokenizer and shards")
    arguments = parser.parse_args(argv)
    for path in (arguments.prepare / "pretrain", arguments.tokenizer):
        if not path.is_dir():
            print(f"error: {path} is missing; see --help", file=sys.stderr)
            return 2
    for name, entry in make_whole_text(arguments.prepare, arguments.tokenizer, arguments.folder)["domains"].items():
        print(f"{name}: {entry['train']['tokens']:,} tokens, {entry['heldout']['tokens']:,} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
