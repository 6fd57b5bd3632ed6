"""`motif2-eval contamination`: which evaluation rows a training corpus holds, by shared runs of 13 words.

    motif2-eval contamination --corpus pretrain/*.jsonl.zst --data_dir DIR [--tasks gsm8k,math] [--output FILE]

Words are lower-cased runs of letters and digits. A row shorter than 13 words counts as one run of its own length, but
not below 8 words: so short a text is in every corpus (both numbers as in GPT-3's check, arXiv 2005.14165, appendix C).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow.parquet
from lm_eval.api.group import Group
from tqdm import tqdm

from eval_harness.loading import load_tasks, nearest
from trainer.cli import parse_recipe
from trainer.data.corpus import open_text

RUN_WORDS = 13
SHORTEST_WORDS = 8
TASKS = {
    "gsm8k": ("motif2_gsm8k_8shot", "question"),
    "math": ("motif2_math_4shot", "problem"),
    "humaneval": ("motif2_humaneval", "prompt"),
    "mbpp": ("motif2_mbpp_3shot", "text"),
    "mmlu": ("motif2_mmlu_5shot", "question"),
}
_WORD = re.compile(r"[^\W_]+")


@dataclass
class ContaminationConfig:
    """One check."""

    corpus: list[str] = field(
        default_factory=list, metadata={"help": ".jsonl, .jsonl.zst, .parquet or text files, or folders of them"}
    )
    column: str = field(default="text", metadata={"help": "column that holds the text"})
    data_dir: str | None = field(default=None, metadata={"help": "local folder with the rows; the hub by default"})
    tasks: str = field(default=",".join(TASKS), metadata={"help": "benchmarks to look for, by commas"})
    output: str | None = field(default=None, metadata={"help": "write the rows that were found as JSON to this file"})

    def __post_init__(self):
        if not self.corpus:
            raise ValueError("corpus is empty; give --corpus with the files of a training corpus")
        for name in self.task_names:
            if name not in TASKS:
                raise ValueError(f"unknown benchmark {name!r}{nearest(name, list(TASKS))}; known: {', '.join(TASKS)}")

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass(frozen=True)
class Contamination:
    """Rows of one benchmark that the corpus holds.

    Attributes:
        rows: rows with at least `SHORTEST_WORDS` words.
        found: row -> how many of its runs the corpus holds, and of how many.
    """

    rows: int
    found: dict[str, tuple[int, int]]


def word_runs(text: str) -> list[str]:
    """All runs of 13 words of a text; of a text with 8 to 12 words, the whole of it; below that none."""
    words = _WORD.findall(text.lower())
    if len(words) < SHORTEST_WORDS:
        return []
    length = min(RUN_WORDS, len(words))
    return [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]


def check(corpus: Iterable[str], benchmarks: dict[str, dict[str, str]]) -> dict[str, Contamination]:
    """Look for evaluation rows in a corpus.

    Args:
        corpus: texts, read once.
        benchmarks: benchmark -> row -> text.

    Returns:
        dict: a result a benchmark.
    """
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    sizes: dict[tuple[str, str], int] = {}
    for benchmark, rows in benchmarks.items():
        for row, text in rows.items():
            runs = set(word_runs(text))
            if runs:
                sizes[benchmark, row] = len(runs)
            for run in runs:
                owners[run].add((benchmark, row))
    lengths: dict[str, set[int]] = defaultdict(set)  # the first words of runs -> how long those runs are
    for run in owners:
        words = run.split()
        lengths[" ".join(words[:SHORTEST_WORDS])].add(len(words))
    seen: set[str] = set()
    for text in corpus:
        words = _WORD.findall(text.lower())
        for start in range(len(words) - SHORTEST_WORDS + 1):
            for length in lengths.get(" ".join(words[start : start + SHORTEST_WORDS]), ()):
                run = " ".join(words[start : start + length])
                if run in owners:
                    seen.add(run)
    hits: dict[tuple[str, str], int] = defaultdict(int)
    for run in seen:
        for owner in owners[run]:
            hits[owner] += 1
    return {
        benchmark: Contamination(
            sum(owner[0] == benchmark for owner in sizes),
            {row: (count, sizes[name, row]) for (name, row), count in sorted(hits.items()) if name == benchmark},
        )
        for benchmark in benchmarks
    }


def read_corpus(path: str | Path, column: str = "text") -> Iterator[str]:
    """Texts of a corpus: `.jsonl`, `.jsonl.zst`, `.parquet` (their `column`), plain text as one, or a folder of them.

    A row whose text is null is left out.

    Raises:
        FileNotFoundError: no such file, or a folder without any.
        ValueError: a file or a row that cannot be read, or that has no text in the column.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if {".jsonl", ".parquet", ".txt"} & set(file.suffixes)]
        if not files:
            raise FileNotFoundError(f"{path} holds no .jsonl, .jsonl.zst, .parquet or .txt file; name the files")
        for file in files:
            yield from read_corpus(file, column)
    elif path.suffix == ".parquet" or {".jsonl", ".zst"} & set(path.suffixes):
        rows = _parquet_rows(path, column) if path.suffix == ".parquet" else _json_rows(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or column not in row:
                names = ", ".join(row) if isinstance(row, dict) else f"no columns but {row!r:.40}"
                raise ValueError(f"{path}, row {number}: no column {column!r}; it has {names}")
            if not isinstance(row[column], str | None):
                raise ValueError(f"{path}, row {number}: {column!r} holds a {type(row[column]).__name__}, not text")
            if row[column] is not None:
                yield row[column]
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no text in UTF-8 ({error}); give .jsonl, .jsonl.zst, .parquet or text"
            ) from error


def _parquet_rows(path: Path, column: str) -> Iterator[dict]:
    file = pyarrow.parquet.ParquetFile(path)
    present = column in file.schema_arrow.names
    for batch in file.iter_batches(columns=[column] if present else None):
        yield from batch.to_pylist()


def _json_rows(path: Path) -> Iterator[object]:
    number = 1
    try:
        with open_text(path) as lines:
            for line in lines:
                yield json.loads(line)
                number += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}, line {number} cannot be read: {error}") from error


def benchmark_texts(names: list[str], data_dir: str | None) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Texts of the evaluation rows: benchmark (a key of `TASKS`) -> row -> question; and parts that are missing."""
    texts: dict[str, dict[str, str]] = {}
    missing: list[str] = []
    for name in names:
        task_name, column = TASKS[name]
        _, loaded, skipped = load_tasks([task_name], data_dir, skip_missing=data_dir is not None)
        missing += skipped
        members = [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]
        texts[name] = {
            f"{task.task_name.partition('::')[2] or name}/{number}": doc[column]
            for task in members
            for number, doc in enumerate(task.eval_docs)
        }
    return texts, missing


def main(argv: list[str]) -> None:
    """Check one corpus and print the contaminated share of each benchmark."""
    (config,) = parse_recipe(ContaminationConfig, description=__doc__, argv=argv)
    for path in config.corpus:
        if not Path(path).exists():
            raise FileNotFoundError(f"corpus {path} does not exist; give a .jsonl, .jsonl.zst, .parquet or text file")
    texts = chain.from_iterable(read_corpus(path, config.column) for path in config.corpus)
    benchmarks, missing = benchmark_texts(config.task_names, config.data_dir)
    results = check(tqdm(texts, desc="reading the corpus", unit="text"), benchmarks)
    for name, result in results.items():
        share = len(result.found) / max(result.rows, 1)
        print(
            f"{name:10} {len(result.found):6} of {result.rows} ({100 * share:.2f}%) share {RUN_WORDS} words in a row"
        )
    if missing:
        print(f"not looked for, since their rows are missing: {', '.join(missing)}")
    if config.output:
        found = {name: result.found for name, result in results.items()}
        Path(config.output).write_text(json.dumps(found, indent=1), encoding="utf-8")
