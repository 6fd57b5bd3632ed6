"""Grow a Motif-2 checkpoint wider, deeper and to more signal heads without changing what it computes.

    motif2-grow --source motif-2.6b --output motif-2-12.7b --width 2 --signal_ratio 4 --insert_every 4 --verify

The order is the report's: the head is untied, hidden and intermediate sizes are multiplied, signal heads are copied
inside their groups, and blocks that add nothing yet are inserted. `growth_plan` says what grows, `growth_rules` how
each tensor follows from the source's, `growth_files` reads and writes shard by shard, and `growth_verify` compares the
two models on text.

Source: arXiv 2511.07464, section 2.
"""

import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, HfArgumentParser

from .configuration_motif2 import Motif2Config
from .growth_files import DTYPES, MANIFEST, CheckpointReader, GrowthFolder, file_sha256, plan_shards
from .growth_plan import Growth, schedule, tensor_shapes
from .growth_rules import growth_rules
from .growth_verify import Verification, verify_growth

FLOPS_CONTEXT_TOKENS = 4096


@dataclass
class GrowthOptions:
    """Settings of `motif2-grow`; only the two folders are needed, and one thing that grows."""

    source: str = field(
        metadata={
            "help": "folder of the parent: a Motif-2 checkpoint in safetensors, in our layout or the official one"
        }
    )
    output: str = field(
        metadata={"help": "folder of the grown checkpoint; an interrupted growth with the same settings goes on in it"}
    )
    width: int = field(default=1, metadata={"help": "factor on the hidden and intermediate sizes"})
    signal_ratio: int | None = field(
        default=None,
        metadata={"help": "signal heads a group of the grown model: any number from the source's own up is exact"},
    )
    insert_every: int | None = field(
        default=None, metadata={"help": "after every so many blocks insert a copy that adds nothing yet"}
    )
    insert_after: list[int] | None = field(
        default=None,
        metadata={"help": "or: source layers, from 0, after which a copy is inserted; twice the same inserts two"},
    )
    untie: bool = field(
        default=False, metadata={"help": "give a tied head its own weight (growing wider does so in any case)"}
    )
    noise_snr_db: float | None = field(
        default=None,
        metadata={
            "help": "signal-to-noise ratio in decibels of noise that tells copies apart and cancels in the output; no "
            "noise by default (assumption: 20 to 40 suit; the report gives no figure)"
        },
    )
    seed: int = field(default=0, metadata={"help": "of the noise"})
    dtype: str | None = field(
        default=None, metadata={"help": f"stored dtype, one of {', '.join(DTYPES)}; the source's by default"}
    )
    max_shard_gb: float = field(default=4.0, metadata={"help": "largest file in gigabytes (10^9 bytes)"})
    verify: bool = field(
        default=False,
        metadata={"help": "then compare both models in float64, a layer at a time, and say where they first differ"},
    )
    verify_text: str | None = field(
        default=None, metadata={"help": "text file to compare on; a built-in sample by default"}
    )
    verify_tokens: int = field(default=64, metadata={"help": "length of the comparison in tokens"})
    dry_run: bool = field(default=False, metadata={"help": "print what would be written, with its size, and stop"})

    def __post_init__(self):
        if not Path(self.source).is_dir():
            raise ValueError(
                f"source={self.source!r} is not a folder: give a local checkpoint (`hf download` makes one)"
            )
        if Path(self.source).resolve() == Path(self.output).resolve():
            raise ValueError(f"output={self.output!r} is the source: choose another folder")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.max_shard_gb > 0:
            raise ValueError(f"max_shard_gb={self.max_shard_gb} must be above 0")
        if self.verify_tokens < 2:
            raise ValueError(f"verify_tokens={self.verify_tokens} must be 2 or more")
        if self.verify_text is not None and not Path(self.verify_text).is_file():
            raise ValueError(f"verify_text={self.verify_text!r} is not a file")


@dataclass(frozen=True)
class GrowthResult:
    """What a growth made.

    Attributes:
        config: configuration of the grown model.
        num_bytes_written: bytes of the shards that this call wrote.
        verification: errors against the source, when it was asked for.
    """

    config: Motif2Config
    num_bytes_written: int
    verification: Verification | None = None


def grow(options: GrowthOptions) -> GrowthResult:
    """Grow a checkpoint, or go on where an interrupted growth stopped.

    Args:
        options: the folders and what grows.

    Returns:
        GrowthResult: with `verification` when `options.verify`.

    Raises:
        ValueError: the parent does not fit, nothing would grow, the output folder holds something else or a finished
            growth, or the disk has too little room. Nothing was written then.
    """
    source_config = read_source_config(options.source)
    reader = CheckpointReader(options.source)
    check_source(reader, source_config)
    growth = Growth(
        source_config,
        width=options.width,
        signal_ratio=options.signal_ratio,
        insert_after=schedule(source_config.num_hidden_layers, options.insert_every, options.insert_after),
        untie=options.untie,
        noise_snr_db=options.noise_snr_db,
        seed=options.seed,
    )
    dtype = getattr(torch, options.dtype) if options.dtype else _widest_dtype(reader)
    written_config = grown_config_dict(options.source, growth, dtype)
    target_config = _config_from_dict(written_config)
    rules = growth_rules(growth, target_config)
    shards = plan_shards(rules, dtype, int(options.max_shard_gb * 1e9))
    print(describe(source_config, target_config))
    print(
        f"{len(rules)} tensors in {len(shards)} files, {sum(shard.num_bytes for shard in shards):,} bytes as {dtype}"
    )
    folder = GrowthFolder(options.output, _settings(options, growth, dtype, reader), shards)
    if folder.is_complete and not options.verify:
        raise ValueError(
            f"{options.output} already holds this growth, finished and undamaged: use it, or choose another folder"
        )
    for file in folder.damaged:
        print(f"{file} is damaged: it is not what {MANIFEST} says was written, and will be written again")
    written = folder.num_bytes_missing
    print(folder.check_room())
    if options.dry_run:
        return GrowthResult(target_config, 0)
    if not folder.is_complete:
        folder.write(reader)
        folder.finish(written_config, Path(options.source), with_code="auto_map" in written_config)
    if not options.verify:
        return GrowthResult(target_config, written)
    verification = verify_growth(
        growth, reader, target_config, CheckpointReader(options.output), options.verify_text, options.verify_tokens
    )
    print(verification.report())
    return GrowthResult(target_config, written, verification)


def read_source_config(folder: str | Path) -> Motif2Config:
    """Reads a parent's config.json, in our layout or the official one.

    Raises:
        ValueError: there is none, or it is not a Motif-2's.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: a checkpoint folder is needed")
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type not in ("motif2", "Motif", "motif"):
        raise ValueError(
            f"{folder} holds a {model_type!r}: only Motif-2 checkpoints (motif2, Motif, motif) can be grown"
        )
    return AutoConfig.from_pretrained(folder)


def check_source(reader: CheckpointReader, config: Motif2Config) -> None:
    """Compares a parent's tensors with what its configuration calls for.

    Raises:
        ValueError: tensors are missing, unknown or misshapen; they are named.
    """
    expected = tensor_shapes(config)
    # A tied head that was stored all the same repeats the embedding.
    names = set(reader.names) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [f"{name} is not a tensor of Motif-2" for name in sorted(names - set(expected))]
    problems += [
        f"{name} has shape {reader.shape(name)}, config.json calls for {shape}"
        for name, shape in expected.items()
        if name in names and reader.shape(name) != shape
    ]
    if problems:
        rest = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{reader.folder} does not fit its config.json: {'; '.join(problems[:5])}{rest}")


def grown_config_dict(source: str | Path, growth: Growth, dtype: torch.dtype) -> dict:
    """The grown model's config.json: the source's with what growth changes, in the same layout.

    Remote code of the official layout is left out: that of Motif-2.6B knows no groups. This package loads the folder.
    """
    written = json.loads((Path(source) / "config.json").read_text()) | growth.config_changes()
    written["dtype"] = str(dtype).removeprefix("torch.")
    if written.pop("torch_dtype", None) is not None:
        written["torch_dtype"] = written.pop("dtype")
    if written["model_type"] != Motif2Config.model_type or not written.get("auto_map"):
        written.pop("auto_map", None)
    if growth.source.layer_types is not None:
        written.pop("layer_types", None)
    return written


def describe(source: Motif2Config, target: Motif2Config) -> str:
    """A table of both shapes, with parameters and floating-point operations a token."""
    rows = [("", "source", "grown")]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        rows.append((name, f"{getattr(source, name):,}", f"{getattr(target, name):,}"))
    rows.append(
        ("signal heads a group", f"{source.num_signal_heads_per_group}", f"{target.num_signal_heads_per_group}")
    )
    rows.append(("tied head", *("yes" if config.tie_word_embeddings else "no" for config in (source, target))))
    rows.append(("parameters", *(f"{count_parameters(config):,}" for config in (source, target))))
    tokens = min(FLOPS_CONTEXT_TOKENS, target.max_position_embeddings)
    flops = [flops_per_token(config, tokens) for config in (source, target)]
    rows.append((f"forward FLOPs a token at {tokens:,}", *(f"{value:.4g}" for value in flops)))
    rows.append((f"training FLOPs a token at {tokens:,}", *(f"{3 * value:.4g}" for value in flops)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def count_parameters(config: Motif2Config) -> int:
    """Parameters of a model with a language-modelling head; a tied head counts once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def flops_per_token(config: Motif2Config, context_tokens: int) -> float:
    """Floating-point operations of a forward pass a token, averaged over a causal context.

    Two a weight of every matrix product, and for every query head two a visible token for each of the D dimensions of
    its key and the 2D of its value; training takes three times as many.
    """
    shapes = tensor_shapes(config)
    weights = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed_tokens" not in name)
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * 3 * config.head_dim * (context_tokens + 1) / 2
    return 2.0 * (weights + attention)


def _config_from_dict(written: dict) -> Motif2Config:
    return AutoConfig.for_model(written["model_type"]).from_dict(dict(written))


def _widest_dtype(reader: CheckpointReader) -> torch.dtype:
    dtype = reader.dtype(reader.names[0])
    for name in reader.names:
        dtype = torch.promote_types(dtype, reader.dtype(name))
    return dtype


def _settings(options: GrowthOptions, growth: Growth, dtype: torch.dtype, reader: CheckpointReader) -> dict:
    """All that decides the bytes of the shards, for the manifest."""
    return {
        "growth": {
            "width": growth.width,
            "signal_ratio": growth.ratio,
            "insert_after": list(growth.insert_after),
            "untie": growth.unties,
            "noise_snr_db": growth.noise_snr_db,
            "seed": growth.seed,
            "dtype": str(dtype).removeprefix("torch."),
            "max_shard_gb": options.max_shard_gb,
        },
        "source": {
            "config.json": file_sha256(reader.folder / "config.json"),
            **reader.checksums(),
        },
    }


def parse_options(argv: list[str] | None = None) -> GrowthOptions:
    """Read the command line.

    Raises:
        SystemExit: on `--help`, an unknown setting (the nearest known one is named), or a value that is refused.
    """
    parser = HfArgumentParser(GrowthOptions, prog="motif2-grow", description=__doc__, allow_abbrev=False)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(
            unknown[0].split("=")[0].replace("-", "_").replace("__", "--", 1), known, n=1
        )
        mend = f"did you mean {nearest[0]}?" if nearest else "--help lists the known ones"
        parser.error(f"unknown setting {unknown[0]!r}; {mend}")
    try:
        return GrowthOptions(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `motif2-grow`; exits with status 1 when the grown model differs from its source."""
    options = parse_options(argv)
    try:
        result = grow(options)
    except ValueError as error:
        sys.exit(f"motif2-grow: {error}")
    if result.verification is not None and not result.verification.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
