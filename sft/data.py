"""Conversations from files to token ids with loss marks; what is malformed is counted, reported, skipped or refused.

A row is `{"messages": [{"role", "content", …}, …], …}`. Roles are system (first only), user, assistant and tool; the
last turn is the assistant's. `tools` may hold tool schemas; other columns are ignored here.
"""

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft.chat import STRUCTURE_TOKENS, encode_conversations
from sft.files import write_text
from trainer.data.corpus import open_text

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
ENCODE_BATCH = 256
EXAMPLES_PER_REASON = 5
PROVENANCE = ("source", "license", "origin")
LABELS = ("domain", "skill", *PROVENANCE)
# What the template writes around a text.
TURN_CHARACTERS = len("<|startofturn|><|assistant|>\n<|endofturn|>")
NOT_UNICODE = "a character that is none (no UTF-8, or a lone surrogate)"
# Rows nested deeper are refused: what writes them as JSON recurses (assumption).
MAX_DEPTH = 64


@dataclass
class DataReport:
    """What became of the rows of a stage.

    Args:
        rows: rows read.
        kept: conversations that train.
        tokens: tokens of the kept conversations.
        trained_tokens: those that the loss counts.
        longest_tokens: tokens of the longest kept conversation.
        truncated: kept conversations that were cut at the longest length.
        dropped: rows left out, by reason.
        places: the first few places (file and row) for each reason.
        provenance: kept conversations by what the rows say of their `source`, `license` and `origin`.
        digest: of the kept conversations' tokens, in order.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    provenance: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in PROVENANCE})
    digest: str = ""

    def keep(self, row: dict, num_tokens: int, num_trained: int) -> None:
        """Count one conversation that trains."""
        self.kept += 1
        self.tokens += num_tokens
        self.trained_tokens += num_trained
        self.longest_tokens = max(self.longest_tokens, num_tokens)
        for name, counts in self.provenance.items():
            counts[str(row.get(name) or "unknown")] += 1

    def drop(self, reason: str, place: str) -> None:
        """Count one row that is left out."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(place)

    def summary(self, what: str = "conversations") -> str:
        """One or more lines for a person: what was kept, and what was dropped for which reason."""
        trained = f", {self.trained_tokens} of them trained" if self.trained_tokens else ""
        lines = [
            f"{self.kept} of {self.rows} {what} kept: {self.tokens} tokens{trained}, the longest "
            f"{self.longest_tokens}" + (f"; {self.truncated} of them cut there" if self.truncated else "")
        ]
        return "\n".join(lines + self.dropped_lines())

    def dropped_lines(self) -> list[str]:
        """One line for each reason: how many rows, and where the first ones stand."""
        return [
            f"  dropped {count}: {reason} (first: {', '.join(self.places[reason])})"
            for reason, count in self.dropped.most_common()
        ]

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_text(json.dumps(vars(self), indent=2, ensure_ascii=False) + "\n", path)


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of a .jsonl, .jsonl.zst or .parquet file; a line that is not JSON is yielded as its text.

    A place is the path as it was given, and the line or row, from 1.

    Raises:
        ValueError: the file does not exist, has another suffix, or is no valid file of its kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"conversation file {str(path)!r} does not exist; correct train_files or eval_files")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.name.endswith((".jsonl", ".jsonl.zst")):
        yield from _json_lines(path)
    else:
        raise ValueError(f"conversation file {str(path)!r} has an unknown suffix; use one of {', '.join(SUFFIXES)}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as parquet: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    # A byte that is no UTF-8 becomes a lone surrogate, by which its row is known.
    try:
        with open_text(path, errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json_row(line)
    except OSError as error:
        if path.suffix != ".zst":
            raise
        raise ValueError(f"{str(path)!r} cannot be read as zstandard: {error}") from error


def _json_row(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also a number of thousands of digits, or brackets without end
        return line


def row_problem(row: object, max_characters: int = 1_000_000) -> str | None:
    """Why a row cannot train, or None.

    Args:
        row: anything that a file may hold.
        max_characters: rows with more text (turns with their markup, calls and tool schemas) are refused before they
            are tokenized.
    """
    if not isinstance(row, dict):
        return "not a JSON object"
    if problem := _value_problem(row):
        return problem
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no messages"
    texts = []
    for position, message in enumerate(messages):
        if problem := _message_problem(message, first=position == 0):
            return problem
        texts += _message_texts(message)
    if messages[-1]["role"] != "assistant":
        return "last turn is not the assistant's"
    opening = messages[messages[0]["role"] == "system"]
    if opening["role"] != "user":
        return "no user turn before the assistant's"
    try:
        tools = row_tools(row)
    except (ValueError, RecursionError):
        return "tools are not JSON"
    if tools is not None and not (isinstance(tools, list) and all(map(_is_schema, tools))):
        return "tools are not a list of schemas"
    if not is_unicode(tools):  # JSON text may hide what it escapes
        return NOT_UNICODE
    texts.append(json.dumps(tools or [], ensure_ascii=False))
    if sum(map(len, texts)) + TURN_CHARACTERS * len(messages) > max_characters:
        return f"more than {max_characters} characters"
    if any(token in text for text in texts if "<|" in text for token in STRUCTURE_TOKENS):
        return "chat markup inside a text"
    return None


def _value_problem(row: dict) -> str | None:
    """Why a row cannot be counted by its labels or written to a file, or None."""
    for name in LABELS:
        if not isinstance(row.get(name), str | None):
            return f"{name} is not text"
    if _is_deep(row):
        return f"nested more than {MAX_DEPTH} deep"
    return None if is_unicode(row) else NOT_UNICODE


def is_unicode(value: object) -> bool:
    """Whether all texts in nested lists and objects can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deep(value: dict | list) -> bool:
    layer = [value]
    for _ in range(MAX_DEPTH):
        insides = [item.values() if isinstance(item, dict) else item for item in layer]
        layer = [item for inside in insides for item in inside if isinstance(item, dict | list | tuple)]
        if not layer:
            return False
    return True


def _message_problem(message: object, first: bool) -> str | None:
    """What is wrong with the form of a message, or None."""
    if not isinstance(message, dict):
        return "a message is not an object"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return "missing role" if role is None else "unknown role"
    if role == "system" and not first:
        return "a system turn that is not the first"
    calls = message.get("tool_calls") or []
    if calls and (role != "assistant" or not isinstance(calls, list) or not all(map(_is_tool_call, calls))):
        return "malformed tool calls"
    if not isinstance(message.get("reasoning_content"), str | None):
        return "reasoning_content is not text"
    if content is None and calls:
        return None
    if not isinstance(content, str):
        return "content is not text"
    return None if content.strip() or calls else "empty turn"


def _message_texts(message: dict) -> list[str]:
    """All that the template writes of a message."""
    calls = message.get("tool_calls")
    texts = [message.get("content"), message.get("reasoning_content"), calls and json.dumps(calls, ensure_ascii=False)]
    return [text for text in texts if text]


def _is_tool_call(call: object) -> bool:
    """Whether a call has a name and arguments, which may be JSON text, as the template writes them."""
    inner = (call.get("function") or call) if isinstance(call, dict) else None
    if not (isinstance(inner, dict) and isinstance(inner.get("name"), str) and "arguments" in inner):
        return False
    try:
        json.dumps(call)  # a parquet file may give dates and bytes
        if isinstance(inner["arguments"], str):
            json.loads(inner["arguments"])
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_schema(tool: object) -> bool:
    if not isinstance(tool, dict) or _is_deep(tool):
        return False
    try:
        json.dumps(tool)
    except TypeError:
        return False
    return True


def load_rows(
    files: Iterable[str | Path],
    report: DataReport,
    bad_rows: str = "skip",
    max_characters: int = 1_000_000,
    malformed: list[tuple[str, str]] | None = None,
) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of every well-formed row; each of its messages has a `content`, which may be None.

    Args:
        files: read in order.
        report: counts the rows read and dropped.
        bad_rows: "skip" or "refuse".
        max_characters: longest text of a row.
        malformed: gets (place, problem) of every row dropped, where given.

    Raises:
        ValueError: a file cannot be read, or `bad_rows` is "refuse" and a row is malformed.
    """
    for file in files:
        for place, row in read_rows(file):
            report.rows += 1
            problem = row_problem(row, max_characters)
            if problem is None:
                yield place, row | {"messages": list(map(_with_content, row["messages"]))}
            elif bad_rows == "refuse":
                raise ValueError(f"row {place} is malformed: {problem}; mend it, or set bad_rows: skip")
            else:
                report.drop(problem, place)
                if malformed is not None:
                    malformed.append((place, problem))


def _with_content(message: dict) -> dict:
    """The message with a `content`, which calls often come without."""
    return message if "content" in message else message | {"content": None}


def load_conversations(
    files: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    bad_rows: str = "skip",
    long_samples: str = "skip",
    max_characters: int = 1_000_000,
    max_samples: int = 0,
    seed: int | None = 0,
) -> tuple[Dataset, DataReport]:
    """Read, check, shuffle and tokenize conversations.

    Args:
        files: .jsonl, .jsonl.zst or .parquet files.
        tokenizer: with the chat template attached.
        max_length: most tokens of a conversation.
        bad_rows: "skip" or "refuse" malformed rows.
        long_samples: "skip", "truncate" or "refuse" conversations of more than `max_length` tokens.
        max_characters: longest text of a row.
        max_samples: keep so many after shuffling; 0 keeps all.
        seed: of the shuffle; None keeps the files' order.

    Returns:
        tuple: a dataset with `messages`, `input_ids` and `assistant_masks` in the form TRL takes, and the report.

    Raises:
        ValueError: a file cannot be read, a row is refused, or nothing is left.
    """
    files = list(files)
    report = DataReport()
    rows = list(load_rows(files, report, bad_rows, max_characters))
    if seed is not None:
        random.Random(seed).shuffle(rows)
    if max_samples:
        rows = rows[:max_samples]
    digest = blake2b(digest_size=16)
    columns: dict[str, list] = {"messages": [], "input_ids": [], "assistant_masks": []}
    for start in range(0, len(rows), ENCODE_BATCH):
        batch = rows[start : start + ENCODE_BATCH]
        token_ids, marks = encode_conversations(
            tokenizer, [row["messages"] for _, row in batch], [row_tools(row) for _, row in batch]
        )
        for (place, row), ids, mark in zip(batch, token_ids, marks, strict=True):
            if _fits(place, ids, mark, max_length, long_samples, report):
                ids, mark = ids[:max_length], mark[:max_length]
                report.keep(row, len(ids), sum(mark))
                columns["messages"].append(list(map(_plain, row["messages"])))
                columns["input_ids"].append(ids)
                columns["assistant_masks"].append(mark)
                digest.update(array("I", [*ids, *mark, len(ids)]))
    report.digest = digest.hexdigest()
    if not columns["input_ids"]:
        raise ValueError(f"no conversation is left from {[str(file) for file in files]}: {report.summary()}")
    return Dataset.from_dict(columns), report


def _plain(message: dict) -> dict:
    """Role and text alone: one schema for every row of the dataset."""
    return {"role": message["role"], "content": message["content"] or ""}


def row_tools(row: dict) -> list | None:
    """Tool schemas of a row, which may hold them as JSON text."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) and tools else tools or None


def _fits(place: str, ids: list[int], mark: list[int], max_length: int, rule: str, report: DataReport) -> bool:
    """Whether a tokenized conversation stays, after the rule for long ones."""
    if len(ids) <= max_length:
        return True
    if rule == "refuse":
        raise ValueError(
            f"row {place} has {len(ids)} tokens, more than max_length {max_length}; "
            "raise max_length, or set long_samples: skip or truncate"
        )
    if rule == "truncate" and any(mark[:max_length]):
        report.truncated += 1
        return True
    report.drop(f"more than {max_length} tokens", place)
    return False
