"""Settings and command line of `motif2-grow`."""

import argparse
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from .growth_files import DTYPES

VERIFY_TOKENS = 64

DESCRIPTION = """\
Grow a Motif-2 checkpoint wider, deeper and to more signal heads. The grown model computes what its parent computes,
so that training goes on where the parent's ended.

  width   --width k         hidden and intermediate size times k; copies of a column share its value
  heads   --signal_ratio r  r signal heads a group; copies of a head share its output
  depth   --insert_every n  after every n-th block a copy whose output projections are zero, so it adds nothing yet
          --insert_after i  or after the blocks named, from 0

Alone or together. Both layouts of checkpoints are read, this package's and the official one."""

EXAMPLES = """\
examples:
  What would be made, and is there room for it? Nothing is written.
    motif2-grow --source motif-2.6b --output motif-2-12.7b --width 2 --signal_ratio 4 --insert_every 4 --dry_run

  Motif-2.6B to the shape of Motif-2-12.7B, copies told apart by noise that cancels in the output, then compared.
    motif2-grow --source motif-2.6b --output motif-2-12.7b --width 2 --signal_ratio 4 --insert_every 4 \\
                --noise_snr_db 20 --verify

  A run of your own with 8 blocks: four more towards the end, two of them after the last, stored in bfloat16.
    motif2-grow --source runs/small/model --output runs/deep --insert_after 4 6 7 7 --dtype bfloat16

An interrupted growth goes on when the same command is given again: finished files are kept if their SHA-256 is still
that of growth.json, and a damaged one is written again. Without noise copies are equal and so are their gradients:
only rounding parts them in training; noise does at once. Status: 0 done; 1 refused, failed, or not the same function;
2 a setting that cannot be; 130 interrupted."""


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
            "help": "signal-to-noise ratio in decibels, 0 or more, of noise that tells copies apart and cancels in "
            "the output; no noise by default (assumption: 20 to 40 suit; the report gives no figure)"
        },
    )
    seed: int = field(default=0, metadata={"help": "of the noise"})
    dtype: str | None = field(
        default=None, metadata={"help": f"stored dtype, one of {', '.join(DTYPES)}; the source's by default"}
    )
    max_shard_gb: float = field(default=4.0, metadata={"help": "largest file in gigabytes (10^9 bytes)"})
    verify: bool = field(
        default=False,
        metadata={
            "help": "then compare both models in float64, a layer at a time, and say where they first differ; given "
            "again for a finished folder, only compares"
        },
    )
    verify_text: str | None = field(
        default=None, metadata={"help": "text file (UTF-8) to compare on; a built-in sample by default"}
    )
    verify_tokens: int = field(default=VERIFY_TOKENS, metadata={"help": "length of the comparison in tokens"})
    dry_run: bool = field(
        default=False,
        metadata={"help": "check everything, print what would be written and the room on the disk, write nothing"},
    )

    def __post_init__(self):
        if not Path(self.source).is_dir():
            raise ValueError(
                f"source={self.source!r} is not a folder: give a local checkpoint (`hf download` makes one)"
            )
        if Path(self.source).resolve() == Path(self.output).resolve():
            raise ValueError(f"output={self.output!r} is the source: choose another folder")
        output = Path(self.output).absolute()
        place = next(place for place in (output, *output.parents) if place.exists())
        if not place.is_dir():
            raise ValueError(f"output={self.output!r}: {place} is a file, a folder is needed; choose another path")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not (self.max_shard_gb > 0 and math.isfinite(self.max_shard_gb)):
            raise ValueError(f"max_shard_gb={self.max_shard_gb} must be above 0 and finite, in gigabytes")
        if self.verify_tokens < 2:
            raise ValueError(f"verify_tokens={self.verify_tokens} must be 2 or more")
        if self.verify_text is not None and not Path(self.verify_text).is_file():
            raise ValueError(f"verify_text={self.verify_text!r} is not a file")
        self._check_that_nothing_is_ignored()

    def _check_that_nothing_is_ignored(self) -> None:
        if not self.verify:
            if self.verify_text is not None:
                raise ValueError(f"verify_text={self.verify_text!r} needs --verify: add it, or leave this out")
            if self.verify_tokens != VERIFY_TOKENS:
                raise ValueError(f"verify_tokens={self.verify_tokens} needs --verify: add it, or leave this out")
        if self.seed and self.noise_snr_db is None:
            raise ValueError(f"seed={self.seed} is of the noise: add --noise_snr_db, or leave this out")


class _Parser(HfArgumentParser):
    """Prints an error alone, without the usage, which hides it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description and the examples, and names defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_options(argv: list[str] | None = None) -> GrowthOptions:
    """Read the command line.

    Raises:
        SystemExit: on `--help`, an unknown setting (the nearest known one is named), or a value that is refused.
    """
    parser = _Parser(
        GrowthOptions,
        prog="motif2-grow",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
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
