"""The data folder of the runs: prepared shards of real text, and the recall task beside them.

Where `data_dir` holds the recall task too, it is taken from there.
"""

import itertools
import json
import shutil
from pathlib import Path

from benchmarks.experiments.recall import recall_documents
from benchmarks.experiments.recipe import RECALL, Recipe
from trainer.data.machine_corpus import machine_documents
from trainer.data.shards import MANIFEST, build_shards, load_manifest
from trainer.data.tokenizer import train_tokenizer
from trainer.model import load_tokenizer

TINY_BYTES, TINY_VOCABULARY = 150_000, 2048
TINY_HELDOUT = 0.2
RECALL_MARGIN = 1.1
# The larger models' data_dir, and what fills it once the smaller set's tokenizer is there.
WHOLE_TEXT, WHOLE_TEXT_COMMAND = "whole_text", "python -m benchmarks.experiments.whole_text --prepare DATA"


def prepare_data(recipes: list[Recipe], folder: Path, tiny: bool) -> Path:
    """Make `folder` with `tokenizer` and `shards` that hold every domain of the recipes; one that is there is kept.

    Args:
        recipes: they must name one `data_dir`.
        folder: to be made. The text's shards in it are links.
        tiny: take text that every machine with Python has, in place of `data_dir`.

    Returns:
        Path: `folder`.

    Raises:
        ValueError: `data_dir` is missing, or the recipes differ in it.
    """
    needed = max((_recall_tokens(recipe) for recipe in recipes), default=0)
    content = json.dumps({"sources": sorted({recipe.data_dir for recipe in recipes}), "recall": needed, "tiny": tiny})
    ready = folder / "ready.json"
    if ready.is_file() and ready.read_text() == content:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "shards").mkdir(parents=True)
    if tiny:
        _tiny_text(folder)
    else:
        _link_text(recipes, folder)
    prepared = (folder / "shards" / RECALL).exists()
    if prepared and (made := load_manifest(folder / "shards")["domains"][RECALL]["train"]["tokens"]) < needed:
        raise ValueError(f"the recall task in data_dir has {made} tokens, and a run reads {needed}: prepare it anew")
    if needed and not prepared:
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        manifest = load_manifest(folder / "shards")
        documents = recall_documents(tokenizer, int(RECALL_MARGIN * needed))
        _build(folder, {RECALL: documents}, tokenizer, manifest["heldout_fraction"], manifest["shard_tokens"])
    ready.write_text(content)
    return folder


def _recall_tokens(recipe: Recipe) -> int:
    """Tokens of the recall task that its longest run reads."""
    needed = [0]
    for arm in recipe.arms:
        settings = recipe.run(arm, 0, recipe.seeds[0]).settings
        share = settings["domains"].get(RECALL, {"start": 0, "end": 0})
        needed.append(int(max(share["start"], share["end"]) * settings["total_tokens"]))
    return max(needed)


def _link_text(recipes: list[Recipe], folder: Path) -> None:
    folders = {recipe.data_dir for recipe in recipes}
    if len(folders) != 1:
        raise ValueError(f"the recipes have data_dir {sorted(folders)}: run those of one data_dir at a time")
    source = Path(folders.pop()).resolve()
    if not (source / "shards" / MANIFEST).is_file():
        then = f", then `{WHOLE_TEXT_COMMAND}`" if source.name == WHOLE_TEXT else ""
        raise ValueError(
            f"data_dir {source} holds no shards: make them with `python benchmarks/sft_stages.py --prepare DATA`"
            f"{then}, or try everything with --tiny"
        )
    (folder / "tokenizer").symlink_to(source / "tokenizer")
    shutil.copy(source / "shards" / MANIFEST, folder / "shards" / MANIFEST)
    for domain in json.loads((source / "shards" / MANIFEST).read_text())["domains"]:
        (folder / "shards" / domain).symlink_to(source / "shards" / domain)


def _tiny_text(folder: Path) -> None:
    general = list(machine_documents("general", "train", TINY_BYTES))
    domains = {
        "general": general[::2],
        "stem": general[1::2],
        "math": list(machine_documents("math", "train", TINY_BYTES)),
        "code": list(machine_documents("code", "train", TINY_BYTES)),
    }
    texts = (document["text"] for document in itertools.chain(*domains.values()))
    tokenizer = train_tokenizer(texts, TINY_VOCABULARY, folder / "tokenizer")
    _build(folder, domains, tokenizer, TINY_HELDOUT, 100_000_000)


def _build(folder: Path, domains: dict, tokenizer, heldout_fraction: float, shard_tokens: int) -> None:
    build_shards(
        folder / "shards",
        domains,
        tokenizer,
        heldout_fraction=heldout_fraction,
        shard_tokens=shard_tokens,
        progress=False,
    )
