"""Small made-up benchmarks in the shape of the hub's copies."""

import json
from pathlib import Path


def write_benchmarks(folder: Path) -> Path:
    """Write GSM8K, one subject of MATH, HumanEval, MBPP and all subjects of MMLU, two rows each."""
    gsm8k = [
        {
            "question": f"Ann has {a} pens and buys {a}. How many?",
            "answer": f"{a} + {a} = <<{a}+{a}={2 * a}>>{2 * a}\n#### {2 * a:,}",
        }
        for a in (7, 600)
    ]
    write_rows(folder / "gsm8k" / "main" / "test.jsonl", gsm8k)
    math = [
        {
            "problem": "Half of one?",
            "solution": r"It is $\boxed{\frac{1}{2}}$.",
            "level": "Level 1",
            "type": "Algebra",
        },
        {"problem": "Who?", "solution": r"It is $\boxed{\text{Evelyn}}$.", "level": "Level 1", "type": "Algebra"},
    ]
    write_rows(folder / "hendrycks_math" / "algebra" / "test.jsonl", math)
    humaneval = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def add{n}(x):\n    """Adds {n} for each of x steps."""\n',
            "canonical_solution": f"    s = 0\n    for _ in range(x):\n        s += {n + 1}\n    return s\n",
            "test": f"def check(candidate):\n    assert candidate(4) == {4 * (n + 1)}\n",
            "entry_point": f"add{n}",
        }
        for n in range(2)
    ]
    write_rows(folder / "openai_humaneval" / "openai_humaneval" / "test.jsonl", humaneval)
    mbpp = [
        {
            "task_id": n,
            "text": f"Add {n}.",
            "code": f"def add(x):\r\n    return x + {n}",
            "test_list": [f"assert add({m}) == {m + n}" for m in range(3)],
            "test_setup_code": "",
        }
        for n in range(1, 12)
    ]
    write_rows(folder / "mbpp" / "full" / "test.jsonl", mbpp[-2:])
    write_rows(folder / "mbpp" / "full" / "prompt.jsonl", mbpp[:5])
    for split in ("dev", "test"):
        rows = [
            {"question": f" Which is {n}? ", "subject": "anatomy", "choices": ["0", "1", "2", "3"], "answer": n % 4}
            for n in range(5 if split == "dev" else 2)
        ]
        write_rows(folder / "mmlu" / "anatomy" / f"{split}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
