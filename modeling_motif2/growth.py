"""Grow a Motif-2 checkpoint wider, deeper and to more signal heads without changing what it computes.

    motif2-grow --source motif-2.6b --output motif-2-12.7b --width 2 --signal_ratio 4 --insert_every 4 --verify

The order is the report's: the head is untied, hidden and intermediate sizes are multiplied, signal heads are copied
inside their groups, and blocks that add nothing yet are inserted. `growth_plan` says what grows, `growth_rules` how
each tensor follows from the source's, `growth_files` reads and writes shard by shard, and `growth_verify` compares the
two models on text.

Source: arXiv 2511.07464, section 2.
"""

import errno
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from .configuration_motif2 import Motif2Config
from .growth_files import (
    INCOMPLETE,
    MANIFEST,
    CheckpointReader,
    GrowthFolder,
    file_sha256,
    one_line,
    plan_shards,
    read_json,
)
from .growth_options import GrowthOptions, parse_options
from .growth_plan import Growth, schedule, tensor_shapes
from .growth_rules import growth_rules
from .growth_verify import Verification, read_token_ids, verify_growth

FLOPS_CONTEXT_TOKENS = 4096
MENDS = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "give --source a folder that you may read and --output one that you may write",
    ),
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "make room and give the same command again; finished files are kept"
    ),
}


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
        ValueError: the parent does not fit, nothing would grow, the text to compare on cannot be read, the output
            folder holds something else or a finished growth, or the disk has too little room. Nothing was written
            then.
        OSError: the disk failed or may not be written; finished files are kept.
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
    token_ids = None
    if options.verify:
        token_ids = read_token_ids(reader.folder, source_config.vocab_size, options.verify_text, options.verify_tokens)
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
    if token_ids is None:
        return GrowthResult(target_config, written)
    verification = verify_growth(growth, reader, target_config, CheckpointReader(options.output), token_ids)
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
    written = read_json(path, INCOMPLETE)
    model_type = written.get("model_type")
    if model_type not in ("motif2", "Motif", "motif"):
        raise ValueError(
            f"{folder} holds a {model_type!r}: only Motif-2 checkpoints (motif2, Motif, motif) can be grown"
        )
    if written.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config: growth needs whole weights; dequantise the checkpoint")
    if written.get("single_attention_call"):
        raise ValueError(
            f"{path} has single_attention_call=true, a copy for engines: grow the checkpoint it was made from"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers and its validators raise many kinds
        raise ValueError(f"{path} does not describe a Motif-2 ({one_line(error)}): correct that value") from error


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
    written = read_json(Path(source) / "config.json", INCOMPLETE) | growth.config_changes()
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
        "num_noise_heads",
        "head_dim",
        "vocab_size",
    ):
        values = (getattr(config, name) for config in (source, target))
        rows.append((name, *("none" if value is None else f"{value:,}" for value in values)))
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


def main(argv: list[str] | None = None) -> None:
    """Entry point of `motif2-grow`; exits with status 1 when the grown model differs from its source."""
    options = parse_options(argv)
    try:
        result = grow(options)
    except ValueError as error:
        sys.exit(f"motif2-grow: {one_line(error)}")
    except OSError as error:
        mend = MENDS.get(error.errno, "give the same command again when that is mended; finished files are kept")
        sys.exit(f"motif2-grow: {one_line(error)}: {mend}")
    except KeyboardInterrupt:
        print("motif2-grow: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
    if result.verification is not None and not result.verification.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
