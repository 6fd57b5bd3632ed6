"""Tokenise the corpus of a recipe: `python -m trainer.data --config recipes/pretrain/motif2_30m.yaml`.

It reads the same recipe as `motif2-pretrain`, which then finds the shards ready.
"""

import itertools

from trainer.assemble import tokenise_sources
from trainer.cli import parse_recipe
from trainer.config import PretrainConfig
from trainer.data.shards import SPLITS, TokenCorpus, check_tokenizer, load_manifest
from trainer.model import load_tokenizer

DESCRIPTION = """Tokenise the domains of a pre-training recipe into shards under data_dir, and list what is there.

Sources are Hub datasets or local files (.parquet, .jsonl, .jsonl.zst, .txt). Domains that are complete are kept, an
interrupted one goes on where it stopped; another tokenizer, other settings or sources, and lost or corrupted shards
are refused. --data_workers N tokenises in N processes, --verify_checksums false compares only the files' sizes."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m trainer.data`."""
    (config,) = parse_recipe(PretrainConfig, description=DESCRIPTION, argv=argv, prog="trainer.data")
    try:
        tokenizer = load_tokenizer(config.tokenizer)
        if any(domain.get("sources") for domain in config.domains.values()):
            tokenise_sources(config, tokenizer)
        check_tokenizer(config.data_dir, tokenizer)
        for name, split in itertools.product(config.domains, SPLITS):
            TokenCorpus(config.data_dir, name, split, config.verify_checksums)
        print(describe_corpus(config.data_dir))
    except (ValueError, OSError) as error:
        raise SystemExit(f"trainer.data: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("trainer.data: interrupted: start the same command again to go on") from None


def describe_corpus(folder: str) -> str:
    """A table of a folder's domains: documents, tokens, held-out documents, licences and sources."""
    lines = [f"{'domain':16} {'documents':>12} {'tokens':>16} {'held out':>9}  licences; sources"]
    for name, entry in load_manifest(folder)["domains"].items():
        train, heldout = entry["train"], entry["heldout"]
        licenses = ", ".join(f"{license} {count:,}" for license, count in sorted(entry["licenses"].items()))
        sources = ", ".join(source["path"] for source in entry["sources"] or ())
        lines.append(
            f"{name:16} {train['documents']:>12,} {train['tokens']:>16,} {heldout['documents']:>9,}  "
            f"{licenses}; {sources}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
