"""Stage 1 data: many sources to one file with domain ratios held by tokens, and a card that says what was dropped.

`python -m sft.prepare --config recipes/sft/prepare_stage1.yaml`. In this order a row is dropped for being malformed,
too short or too long, contaminated by an evaluation set, a near-duplicate, or beyond its domain's share.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sft.chat import encode_conversations
from sft.config import ROW_RULES
from sft.data import DataReport, load_rows, read_rows, row_tools
from sft.data_card import write_data_card
from sft.examples import write_conversations
from sft.files import new_train_file, write_lines
from sft.filters import Contamination, NearDuplicates, conversation_text, nested_texts
from sft.mixing import domain_budgets, fill_budgets, parse_ratios
from trainer.cli import parse_recipe

BATCH = 256
HELD = "prepared data"


@dataclass
class PrepareConfig:
    """Settings of the data preparation.

    Raises:
        ValueError: a value is out of range.
    """

    train_files: list[str] = field(
        default_factory=list, metadata={"help": "conversations with `messages`, `domain`, `source`, `license`"}
    )
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "evaluation sets (.jsonl, .parquet); all their text is kept out"}
    )
    output_dir: str = field(default="", metadata={"help": "gets train.jsonl, dropped.jsonl, card.json and README.md"})
    tokenizer: str = field(default="", metadata={"help": "folder or Hub name of the tokenizer that counts tokens"})
    domain_ratios: list[str] = field(
        default_factory=list, metadata={"help": "domain=share words, by tokens; empty keeps everything"}
    )
    total_tokens: int = field(default=0, metadata={"help": "tokens wanted; 0: as many as the ratios allow"})
    min_tokens: int = field(default=16, metadata={"help": "shortest conversation (assumption)"})
    max_tokens: int = field(default=16_384, metadata={"help": "longest conversation"})
    duplicate_threshold: float = field(default=0.8, metadata={"help": "similarity that counts as a duplicate"})
    seed: int = field(default=0, metadata={"help": "seed of the drawing"})
    bad_rows: str = field(default="skip", metadata={"help": "malformed rows: skip (and count) or refuse"})

    def __post_init__(self):
        if self.bad_rows not in ROW_RULES:
            raise ValueError(f"bad_rows is {self.bad_rows!r}; use skip or refuse")
        for name in ("train_files", "output_dir", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; set it in the recipe or on the command line")
        if not 0 < self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; use 1 or more, and min <= max"
            )
        if not 0 < self.duplicate_threshold < 1:
            raise ValueError(f"duplicate_threshold is {self.duplicate_threshold}; use a similarity between 0 and 1")
        if self.total_tokens < 0:
            raise ValueError(f"total_tokens is {self.total_tokens}; use 0 or more")
        if self.total_tokens and not self.domain_ratios:
            raise ValueError(f"total_tokens is {self.total_tokens} without domain_ratios; give each domain a share")
        parse_ratios(self.domain_ratios)


@dataclass
class Prepared:
    """Rows that stay with their token counts, and what goes.

    Args:
        rows: conversations that stay.
        num_tokens: tokens of each.
        dropped: (place, row, reason) of each well-formed row that goes.
        report: counts of all of it.
        malformed: (place, problem) of rows that are no conversations.
    """

    rows: list[dict]
    num_tokens: list[int]
    dropped: list[tuple[str, dict, str]]
    report: DataReport
    malformed: list[tuple[str, str]] = field(default_factory=list)


def prepare(config: PrepareConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Filter and mix conversations; nothing is written.

    Args:
        config: the settings.
        tokenizer: with the chat template attached; counts tokens.

    Returns:
        Prepared: the rows that stay, and each other row with its reason.

    Raises:
        ValueError: a file cannot be read, the ratios do not fit the data, or nothing is left.
    """
    report = DataReport()
    contamination = Contamination(evaluation_texts(config.eval_files))
    duplicates = NearDuplicates(config.duplicate_threshold)
    places, rows, counts, dropped, malformed = [], [], [], [], []
    for place, row, num_tokens in _counted(
        load_rows(config.train_files, report, config.bad_rows, malformed=malformed), tokenizer
    ):
        text = conversation_text(row)
        if num_tokens < config.min_tokens:
            reason = f"fewer than {config.min_tokens} tokens"
        elif num_tokens > config.max_tokens:
            reason = f"more than {config.max_tokens} tokens"
        elif contamination.found_in(text):
            reason = "evaluation text"
        elif duplicates.add(place, text) is not None:
            reason = "near-duplicate"
        else:
            places.append(place)
            rows.append(row)
            counts.append(num_tokens)
            continue
        dropped.append((place, row, reason))
    if rows and config.domain_ratios:
        kept, surplus = _mix(config, rows, counts)
        dropped += [(places[index], rows[index], "beyond its domain's share") for index in surplus]
        rows, counts = [rows[index] for index in kept], [counts[index] for index in kept]
    for place, _, reason in dropped:
        report.drop(reason, place)
    if not rows:
        raise ValueError(f"no conversation is left from {config.train_files}: {report.summary()}")
    report.kept, report.tokens, report.longest_tokens = len(rows), sum(counts), max(counts)
    return Prepared(rows, counts, dropped, report, malformed)


def evaluation_texts(files: Iterable[str]) -> Iterator[str]:
    """Every text in the rows of evaluation files, at any depth.

    Raises:
        ValueError: a file cannot be read.
    """
    for file in files:
        for _, row in read_rows(file):
            yield from nested_texts(row)


def _counted(rows: Iterable[tuple[str, dict]], tokenizer) -> Iterator[tuple[str, dict, int]]:
    """Each row with the tokens that its conversation takes in training."""
    batch: list[tuple[str, dict]] = []
    for item in rows:
        batch.append(item)
        if len(batch) == BATCH:
            yield from _count_batch(batch, tokenizer)
            batch = []
    if batch:
        yield from _count_batch(batch, tokenizer)


def _count_batch(batch, tokenizer) -> Iterator[tuple[str, dict, int]]:
    token_ids, _ = encode_conversations(
        tokenizer, [row["messages"] for _, row in batch], [row_tools(row) for _, row in batch]
    )
    for (place, row), ids in zip(batch, token_ids, strict=True):
        yield place, row, len(ids)


def _mix(config: PrepareConfig, rows: list[dict], counts: list[int]) -> tuple[list[int], list[int]]:
    """Indices of the rows that hold the ratios, and of the others."""
    domains = [row.get("domain") or "unknown" for row in rows]
    available: Counter = Counter()
    for domain, count in zip(domains, counts, strict=True):
        available[domain] += count
    budgets = domain_budgets(available, parse_ratios(config.domain_ratios), config.total_tokens)
    return fill_budgets(domains, counts, budgets, config.seed)


def write_prepared(prepared: Prepared, output_dir: str | Path) -> Path:
    """Write dropped.jsonl (each row's place, source and reason), the card, and last train.jsonl; returns the latter.

    Raises:
        ValueError: the folder holds prepared data.
        OSError: a file cannot be written; there is no train.jsonl then.
    """
    folder, train_file = Path(output_dir), new_train_file(output_dir, HELD)
    lines = [
        {"place": place, "source": row.get("source"), "domain": row.get("domain"), "reason": reason}
        for place, row, reason in prepared.dropped
    ]
    lines += [{"place": place, "reason": f"malformed: {problem}"} for place, problem in prepared.malformed]
    write_lines(lines, folder / "dropped.jsonl")
    write_data_card(prepared, folder)
    return write_conversations(prepared.rows, train_file)


def main(argv: list[str] | None = None) -> None:
    """Prepare data as a recipe says and print the report.

    Raises:
        SystemExit: a setting, file or ratio cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(PrepareConfig, description=__doc__, argv=argv)
    from sft.stage import load_tokenizer

    try:
        new_train_file(config.output_dir, HELD)
        prepared = prepare(config, load_tokenizer(config.tokenizer))
        train_file = write_prepared(prepared, config.output_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(f"sft.prepare: {error}") from error
    print(prepared.report.summary())
    print(f"{train_file}; what was dropped and why: {train_file.with_name('dropped.jsonl')}")


if __name__ == "__main__":
    main()
