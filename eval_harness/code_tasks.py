"""Score HumanEval and MBPP: put each response together with its problem, and judge it in the sandbox.

The programs of a task run as one batch in lm-eval's filter step, several at a time; `score` then reads the verdicts.
`MOTIF2_WEAK_SANDBOX=1` (set by `--weak_sandbox`) goes on without bubblewrap.
"""

import ast
import builtins
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence

from eval_harness.answers import after_thinking
from eval_harness.sandbox import Program, Sandbox
from eval_harness.statistics import pass_at_k

WEAK_VARIABLE = "MOTIF2_WEAK_SANDBOX"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:(?:\n[ \t]*)?```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_BEGIN = re.compile(r"\A\s*\[BEGIN\][ \t]*")


@functools.cache
def sandbox() -> Sandbox:
    """The process's sandbox, started with the first program."""
    return Sandbox(weak=os.environ.get(WEAK_VARIABLE) == "1")


def code_block(text: str, needed: str = "") -> str | None:
    """The last fenced block of a response that contains `needed`, moved to the margin; None where there is none."""
    blocks = [block for block in _FENCE.findall(after_thinking(text)) if needed in block]
    return textwrap.dedent(blocks[-1]) if blocks else None


def humaneval_program(response: str, doc: dict) -> Program:
    """A HumanEval response and its problem.

    A base model continues the prompt; a chat model gives the function anew, fenced or not. The judge takes the
    prompt's helper functions from the prompt itself, and only the asked-for function from the response.
    """
    header = f"def {doc['entry_point']}("
    block = code_block(response, header)
    if block is None and header in (answer := after_thinking(response)):
        block = answer
    source = doc["prompt"] + (f"\n    pass\n\n{block}" if block is not None else response)
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    return Program(source, tests, (doc["entry_point"],), setup=f"{doc['prompt']}\n    pass\n")


def mbpp_program(response: str, doc: dict) -> Program:
    """An MBPP response (fenced or not, from `[BEGIN]` to `[DONE]`, inside a fence too) and its problem's assertions.

    Of several fenced blocks the last one counts that defines an asked-for function: an example may follow it.
    """
    tests = "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])
    needed = names_needed(tests)
    modules = [name for name in needed if name in sys.stdlib_module_names]
    names = tuple(name for name in needed if name not in modules)
    blocks = [code_block(response, f"def {name}(") for name in names] + [code_block(response)]
    source = next((block for block in blocks if block is not None), after_thinking(response))
    source = _BEGIN.sub("", source.split("[DONE]")[0])
    setup = "\n".join(f"import {name}" for name in modules)
    return Program(source, tests, names, setup)


def names_needed(tests: str) -> list[str]:
    """Names that assertions read and the program defines; builtins only where the assertions read nothing else."""
    read, bound = [], set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (read.append if isinstance(node.ctx, ast.Load) else bound.add)(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    free = [name for name in dict.fromkeys(read) if name not in bound]
    return [name for name in free if name not in dir(builtins)] or free


def judge(
    build: Callable[[str, dict], Program], responses: Sequence[Sequence[str]], docs: Sequence[dict]
) -> list[list[dict]]:
    """lm-eval filter: the verdict on every response, in order."""
    programs = [build(text, doc) for texts, doc in zip(responses, docs, strict=True) for text in texts]
    outcomes = iter(sandbox().run_many(programs))
    return [
        [{"passed": verdict.passed, "reason": verdict.reason} for verdict in _take(outcomes, texts)]
        for texts in responses
    ]


def judge_humaneval(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[dict]]:
    """`judge` for HumanEval."""
    return judge(humaneval_program, responses, docs)


def judge_mbpp(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[dict]]:
    """`judge` for MBPP."""
    return judge(mbpp_program, responses, docs)


def score(doc: dict, results: list[list[dict]]) -> dict[str, float]:
    """lm-eval `process_results`: pass@k by the unbiased estimator, for each k that the samples allow."""
    verdicts = results[0]
    passed = sum(verdict["passed"] for verdict in verdicts)
    return {f"pass@{k}": pass_at_k(len(verdicts), passed, k) for k in (1, 10, 100) if k <= len(verdicts)}


def _take(iterator, like: Sequence) -> list:
    return [next(iterator) for _ in like]
