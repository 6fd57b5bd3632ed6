"""Score a model on tasks through lm-eval, from Python: `evaluate(model, tokenizer, ["motif2_arithmetic"], data_dir=…)`.

`motif2-eval` is the same thing from the command line, with suites, resuming and reports.
"""

import difflib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS_DIR = Path(__file__).with_name("tasks")
SEED = 1234


class QuietHFLM(HFLM):
    """lm-eval's model for transformers with one progress bar instead of one a batch."""

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)


@dataclass
class EvaluationResult:
    """Scores of one run.

    Attributes:
        metrics: task or group -> metric -> score (a share for accuracies, bits for `bits_per_byte`).
        standard_errors: the same keys; missing where lm-eval knows none.
        samples: task -> one record a row: prompt, response, filtered response, metrics.
        num_samples: task -> rows that were scored.
        seconds: wall-clock time of the run.
        raw: everything lm-eval returned but the samples.
    """

    metrics: dict[str, dict[str, float]]
    standard_errors: dict[str, dict[str, float]]
    samples: dict[str, list[dict]]
    num_samples: dict[str, int]
    seconds: float
    raw: dict = field(repr=False, default_factory=dict)

    def score(self, task: str) -> float:
        """The first metric of a task."""
        return next(iter(self.metrics[task].values()))


def evaluate(
    model: PreTrainedModel | LM | str,
    tokenizer_or_path: PreTrainedTokenizerBase | str | None,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    generation_options: dict | None = None,
    seed: int = SEED,
) -> EvaluationResult | None:
    """Score a model on tasks.

    Args:
        model: a transformers model on its device, a path or hub name, or an lm-eval model.
        tokenizer_or_path: its tokenizer or where to load it; None with a path (the same place) or an lm-eval model.
        tasks: names of our tasks (the YAML files in `eval_harness/tasks`) or of lm-eval's.
        data_dir: local folder with the tasks' rows; None reads from the hub.
        output_dir: where `results.json`, the samples and the report go; None writes nothing.
        limit: rows a task at most, from the top; None scores all.
        batch_size: sequences at a time; changes speed, not greedy answers.
        apply_chat_template: wrap every prompt into the tokenizer's chat template.
        generation_options: override the tasks' own, for example `{"max_gen_toks": 64}`.
        seed: of few-shot draws and sampling.

    Returns:
        EvaluationResult, or None on every rank but the first of a multi-process run.

    Raises:
        ValueError: an unknown task (the nearest is named), or no chat template where one is to be applied.
        MissingDataset: a task's rows are not where they should be.
    """
    lm = wrap_model(model, tokenizer_or_path, batch_size)
    if apply_chat_template:
        require_chat_template(lm.tokenizer)
    manager, loaded = load_tasks(tasks, data_dir, apply_chat_template)
    started = time.time()
    with _quiet_lm_eval():
        results = simple_evaluate(
            lm,
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            gen_kwargs=generation_options,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=1000,
        )
    if results is None:
        return None
    return _collect(results, time.time() - started)


def wrap_model(
    model: PreTrainedModel | LM | str, tokenizer: PreTrainedTokenizerBase | str | None, batch_size: int
) -> LM:
    """Give lm-eval its view of a transformers model; an lm-eval model passes through."""
    if isinstance(model, LM):
        return model
    if isinstance(model, str):
        import modeling_motif2  # noqa: F401  (registers Motif-2 with the Auto classes)

        return QuietHFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    if tokenizer is None:
        raise ValueError("tokenizer_or_path is None; give the tokenizer that belongs to the model")
    was_training = model.training
    with _quiet_lm_eval():
        lm = QuietHFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    model.train(was_training)
    return lm


def require_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: it has none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, so it is no instruct model; "
            "use the base suite, or attach one with sft.chat.attach_chat_template"
        )


def load_tasks(
    names: Sequence[str], data_dir: str | Path | None = None, apply_chat_template: bool = False
) -> tuple[TaskManager, list[Task | Group]]:
    """Build tasks by name, with their rows.

    Args:
        names: of our tasks or groups, or of lm-eval's (indexing those takes some seconds, so only when one is asked for).
        data_dir: local folder with the rows; None reads from the hub.
        apply_chat_template: use a task's `chat_prompt` (in its metadata) instead of its raw prompt where it has one.

    Raises:
        ValueError: an unknown name; the nearest known one is named.
        MissingDataset: the rows of one of our tasks are not where they should be.
    """
    if not names:
        raise ValueError("no task is named; give at least one")
    metadata = {"data_dir": str(data_dir)} if data_dir is not None else {}
    with _quiet_lm_eval():
        manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(TASKS_DIR), metadata=metadata)
        for name in names:
            if name not in manager.all_tasks:
                nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
                raise ValueError(f"unknown task {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        prompt = (task.config.metadata or {}).get("chat_prompt")
        if apply_chat_template and prompt:
            task.set_config("doc_to_text", prompt)
    children = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    top_groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
    return manager, top_groups + [task for name, task in loaded["tasks"].items() if name not in children]


class _quiet_lm_eval:
    """lm-eval reports every step as information or warning; only errors pass while this is open."""

    def __enter__(self):
        self.logger = logging.getLogger("lm_eval")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *error):
        self.logger.setLevel(self.level)


def _collect(results: dict, seconds: float) -> EvaluationResult:
    metrics, errors = {}, {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        scores = {key: value for key, value in values.items() if "," in key and isinstance(value, float | int)}
        metrics[name] = {_metric(key): value for key, value in scores.items() if "_stderr," not in key}
        errors[name] = {_metric(key.replace("_stderr,", ",")): v for key, v in scores.items() if "_stderr," in key}
    samples = results.pop("samples", {})
    counts = {name: count["effective"] for name, count in results["n-samples"].items()}
    return EvaluationResult(metrics, errors, samples, counts, seconds, raw=results)


def _metric(key: str) -> str:
    """lm-eval's `metric,filter`; the filter is left out where the task has one only."""
    name, _, chosen = key.partition(",")
    return name if chosen in ("none", "answer") else f"{name},{chosen}"
