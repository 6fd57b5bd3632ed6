"""Prove the tasks themselves: reference solutions must score 100%, near misses 0, through the whole pipeline.

    python -m eval_harness.gold --data_dir DIR [--near_miss] [--tasks gsm8k,math,humaneval,mbpp,mmlu]

Prompts, stop sequences, filters, metrics and the sandbox are those of a real run; only the model is replaced by one
that knows each row's solution. A row on which this fails is a defect of the task or of the dataset; those of the
datasets are listed in `gold_exceptions.csv`, row by row, and any other makes the command fail.
"""

import csv
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from eval_harness.code_tasks import humaneval_program, mbpp_program, sandbox
from eval_harness.evaluate import evaluate
from eval_harness.loading import nearest
from eval_harness.near_misses import continuation, differs, mutants, near_expression, near_number
from eval_harness.sandbox import SandboxUnavailable
from trainer.cli import parse_recipe

EXCEPTIONS_FILE = Path(__file__).with_name("gold_exceptions.csv")
TASKS = {
    "gsm8k": "motif2_gsm8k_8shot",
    "math": "motif2_math_4shot",
    "humaneval": "motif2_humaneval",
    "mbpp": "motif2_mbpp_3shot",
    "mmlu": "motif2_mmlu_5shot",
}
MUTANT_ROUNDS = 40
# CPython before 3.13 counts the depth of syntax trees once for all threads: one thread at a time may build them.
_SYNTAX_TREES = threading.Lock()


@dataclass
class GoldConfig:
    """One replay."""

    data_dir: str | None = field(default=None, metadata={"help": "local folder with the rows; the hub by default"})
    near_miss: bool = field(default=False, metadata={"help": "answer almost right; the score must be 0"})
    tasks: str = field(default=",".join(TASKS), metadata={"help": "benchmarks to replay, by commas"})
    limit: int | None = field(default=None, metadata={"help": "rows a task at most, from the top"})

    def __post_init__(self):
        for name in self.benchmarks:
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}{nearest(name, list(TASKS))}; known: {', '.join(TASKS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; use 1 or more")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"data_dir {self.data_dir!r} is no folder; give the folder that holds gsm8k, mmlu, …")

    @property
    def benchmarks(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass(frozen=True)
class Replay:
    """What one replay found.

    Attributes:
        benchmark: a key of `TASKS`.
        rows: rows replayed.
        wrong: row -> what went otherwise than it should.
        skipped: parts of the benchmark whose rows are missing.
    """

    benchmark: str
    rows: int
    wrong: dict[str, str]
    skipped: list[str]


class SolutionLM(LM):
    """Answers with a function of the row, cut at the task's stop sequences like any model's text."""

    def __init__(self, answer: Callable[[dict, int], str], near_miss: bool):
        super().__init__()
        self.answer = answer
        self.near_miss = near_miss

    def generate_until(self, requests, disable_tqdm=False):
        with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:  # near misses of programs wait for the sandbox
            texts = list(pool.map(lambda request: self.answer(request.doc, request.doc_id), requests))
        return [postprocess_generated_text(t, r.args[1]["until"], None) for t, r in zip(texts, requests, strict=True)]

    def loglikelihood(self, requests, disable_tqdm=False):
        """The right letter is likeliest; for near misses the next letter is."""
        wanted = ["ABCD"[(request.doc["answer"] + self.near_miss) % 4] for request in requests]
        hits = [request.args[1].strip() == letter for request, letter in zip(requests, wanted, strict=True)]
        return [(0.0 if hit else -1.0, hit) for hit in hits]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise ValueError("no task with a reference solution asks for the likelihood of a whole text")


def replay(benchmark: str, data_dir: str | Path | None, near_miss: bool = False, limit: int | None = None) -> Replay:
    """Run one benchmark with solutions, or near misses, in the model's place.

    Args:
        benchmark: a key of `TASKS`.
        data_dir: local folder with the rows; None reads from the hub.
        near_miss: answer almost right instead.
        limit: rows a task at most.
    """
    answer = partial(ANSWERS[benchmark], near_miss=near_miss)
    result = evaluate(
        SolutionLM(answer, near_miss),
        None,
        [TASKS[benchmark]],
        data_dir=data_dir,
        limit=limit,
        skip_missing=data_dir is not None,
        batch_size=10_000,
    )
    wrong, rows = {}, 0
    for task, samples in result.samples.items():
        for sample in samples:
            if sample["filter"] in ("none", "answer"):
                rows += 1
                _note(wrong, benchmark, task, sample, near_miss)
    return Replay(benchmark, rows, wrong, result.skipped)


def _note(wrong: dict[str, str], benchmark: str, task: str, sample: dict, near_miss: bool) -> None:
    for metric in sample["metrics"]:
        if sample[metric] != float(not near_miss):
            detail = sample["filtered_resps"][0]
            text = detail[0]["reason"] if isinstance(detail, list) else detail
            wrong[row_name(benchmark, task, sample)] = f"{metric} is {sample[metric]:g}: {str(text)[-200:]!r}"


def row_name(benchmark: str, task: str, sample: dict) -> str:
    """How a row is called in the list of exceptions."""
    if "task_id" in sample["doc"]:
        return str(sample["doc"]["task_id"])
    part = task.partition("::")[2]
    return f"{part}/{sample['doc_id']}" if part else str(sample["doc_id"])


def _gsm8k(doc: dict, row: int, near_miss: bool) -> str:
    steps, _, number = doc["answer"].rpartition("####")
    number = number.strip().replace(",", "")
    steps = re.sub(r"<<.*?>>", "", steps).strip()
    return f"{steps} The answer is {near_number(number, row) if near_miss else number}."


def _math(doc: dict, row: int, near_miss: bool) -> str:
    if near_miss:
        return f"Final Answer: The final answer is ${near_expression(doc['answer'], row)}$. I hope it is correct."
    return f"{doc['solution']}\nFinal Answer: The final answer is ${doc['answer']}$. I hope it is correct."


def _humaneval(doc: dict, row: int, near_miss: bool) -> str:
    if not near_miss:
        return doc["canonical_solution"]
    reference, entry = doc["prompt"] + doc["canonical_solution"], doc["entry_point"]
    program = _near_program(reference, entry, humaneval_program("", doc))
    with _SYNTAX_TREES:
        return continuation(program, entry)


def _mbpp(doc: dict, row: int, near_miss: bool) -> str:
    reference = doc["code"].replace("\r\n", "\n")
    if not near_miss:
        return f"{reference}\n[DONE]"
    with _SYNTAX_TREES:
        program = mbpp_program(reference, doc)
    return f"{_near_program(reference, program.names[0], program)}\n[DONE]"


def _near_program(reference: str, entry: str, program) -> str:
    """The first mutant that gives something else on an input of the row's tests."""
    with _SYNTAX_TREES:
        candidates = list(mutants(reference, entry))
    for candidate in candidates[:MUTANT_ROUNDS]:
        if sandbox().run(differs(reference, candidate, program)).passed:
            return candidate
    return candidates[-1]


ANSWERS = {"gsm8k": _gsm8k, "math": _math, "humaneval": _humaneval, "mbpp": _mbpp, "mmlu": _gsm8k}


def read_exceptions(near_miss: bool) -> dict[str, dict[str, str]]:
    """Rows known to fail for a defect of their dataset: benchmark -> row -> defect."""
    kind = "near_miss" if near_miss else "gold"
    listed: dict[str, dict[str, str]] = {benchmark: {} for benchmark in TASKS}
    with EXCEPTIONS_FILE.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["kind"] == kind:
                listed[line["benchmark"]][line["row"]] = line["defect"]
    return listed


def main(argv: list[str] | None = None) -> int:
    """Replay and print a table; 1 when a row fails that is not listed."""
    (config,) = parse_recipe(GoldConfig, description=__doc__, argv=argv)
    listed, failures = read_exceptions(config.near_miss), 0
    try:
        for benchmark in config.benchmarks:
            found = replay(benchmark, config.data_dir, config.near_miss, config.limit)
            failures += _print(found, listed[benchmark], config.near_miss)
    except (FileNotFoundError, SandboxUnavailable) as error:
        sys.exit(f"gold replay: {error}")
    return int(failures > 0)


def _print(found: Replay, listed: dict[str, str], near_miss: bool) -> int:
    new = {row: detail for row, detail in found.wrong.items() if row not in listed}
    as_should = found.rows - len(found.wrong)
    score = len(found.wrong) / found.rows if near_miss else as_should / found.rows
    missing = f"  missing: {', '.join(found.skipped)}" if found.skipped else ""
    counts = f"listed exceptions {len(found.wrong) - len(new)}  others {len(new)}{missing}"
    print(f"{found.benchmark:10} {found.rows:6} rows  score {100 * score:.2f}%  {counts}", flush=True)
    for row in found.wrong:
        print(f"    {row}: {listed.get(row, 'NOT LISTED: ' + found.wrong[row])}", flush=True)
    return len(new)


if __name__ == "__main__":
    sys.exit(main())
