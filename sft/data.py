"""Conversations from files to token ids with loss marks; what is malformed is counted, reported, skipped or refused.

A row is `{"messages": [{"role", "content", …}, …], …}`. Roles are system (first only), user, assistant and tool; the
last turn is the assistant's. `tools` may hold tool schemas; other columns are ignored here.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft.chat import STRUCTURE_TOKENS, encode_conversations

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
ENCODE_BATCH = 256
EXAMPLES_PER_REASON = 5
PROVENANCE = ("source", "license", "origin")


@dataclass
class DataReport:
    """What became of the rows of a stage.

    Args:
        rows: rows read.
        kept: conversations that train.
        tokens: tokens of the kept conversations.
        trained_tokens: those that the loss counts.
        longest_tokens: tokens of the longest kept conversation.
        dropped: rows left out, by reason.
        places: the first few places (file and row) for each reason.
        provenance: kept conversations by what the rows say of their `source`, `license` and `origin`.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    dropped: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    provenance: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in PROVENANCE})

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

    def summary(self) -> str:
        """Two or more lines for a person: what was kept, and what was dropped for which reason."""
        trained = f", {self.trained_tokens} of them trained" if self.trained_tokens else ""
        lines = [
            f"{self.kept} of {self.rows} conversations kept: {self.tokens} tokens{trained}, the longest "
            f"{self.longest_tokens}"
        ]
        lines += [
            f"  dropped {count}: {reason} (first: {', '.join(self.places[reason])})"
            for reason, count in self.dropped.most_common()
        ]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(vars(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of a .jsonl, .jsonl.zst or .parquet file; a line that is not JSON is yielded as its text.

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
                yield f"{path.name}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as parquet: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with _open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = line
                yield f"{path.name}:{number}", row


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterable[str]]:
    if path.suffix != ".zst":
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield lines
        return
    import zstandard

    try:
        with zstandard.open(path, "rt", encoding="utf-8", errors="replace") as lines:
            yield lines
    except zstandard.ZstdError as error:
        raise ValueError(f"{str(path)!r} cannot be read as zstandard: {error}") from error


def row_problem(row: object, max_characters: int = 1_000_000) -> str | None:
    """Why a row cannot train, or None.

    Args:
        row: anything that a file may hold.
        max_characters: rows with more text are refused before they are tokenized.
    """
    if not isinstance(row, dict):
        return "not a JSON object"
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no messages"
    characters = 0
    for position, message in enumerate(messages):
        problem = _message_problem(message, first=position == 0)
        if problem:
            return problem
        characters += len(message.get("content") or "") + len(message.get("reasoning_content") or "")
    if characters > max_characters:
        return f"more than {max_characters} characters"
    if messages[-1]["role"] != "assistant":
        return "last turn is not the assistant's"
    opening = messages[messages[0]["role"] == "system"]
    if opening["role"] != "user":
        return "no user turn before the assistant's"
    try:
        tools = row_tools(row)
    except json.JSONDecodeError:
        return "tools are not JSON"
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return "tools are not a list of schemas"
    return None


def _message_problem(message: object, first: bool) -> str | None:
    if not isinstance(message, dict):
        return "a message is not an object"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return "missing role" if role is None else "unknown role"
    if role == "system" and not first:
        return "a system turn that is not the first"
    tool_calls = message.get("tool_calls")
    if tool_calls and (role != "assistant" or not all(_is_tool_call(call) for call in tool_calls)):
        return "malformed tool calls"
    if content is None and tool_calls:
        return None
    if not isinstance(content, str):
        return "content is not text"
    if not content.strip() and not tool_calls:
        return "empty turn"
    thinking = message.get("reasoning_content")
    if thinking is not None and not isinstance(thinking, str):
        return "reasoning_content is not text"
    if any(token in text for token in STRUCTURE_TOKENS for text in (content, thinking or "") if "<|" in text):
        return "chat markup inside a text"
    return None


def _is_tool_call(call: object) -> bool:
    inner = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(inner, dict) and isinstance(inner.get("name"), str) and "arguments" in inner


def load_rows(
    files: Iterable[str | Path], report: DataReport, bad_rows: str = "skip", max_characters: int = 1_000_000
) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of every well-formed row.

    Args:
        files: read in order.
        report: counts the rows read and dropped.
        bad_rows: "skip" or "refuse".
        max_characters: longest text of a row.

    Raises:
        ValueError: a file cannot be read, or `bad_rows` is "refuse" and a row is malformed.
    """
    for file in files:
        for place, row in read_rows(file):
            report.rows += 1
            problem = row_problem(row, max_characters)
            if problem is None:
                yield place, row
            elif bad_rows == "refuse":
                raise ValueError(f"row {place} is malformed: {problem}; mend it, or set bad_rows: skip")
            else:
                report.drop(problem, place)


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
        return True
    report.drop(f"more than {max_length} tokens", place)
    return False
