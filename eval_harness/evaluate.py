"""Score a model on tasks through lm-eval: `evaluate(model, tokenizer, ["motif2_arithmetic"], data_dir=…)`.

`motif2-eval` is the same from the command line, with suites and reports.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modeling_motif2  # noqa: F401  (registers Motif-2 with the Auto classes)
from eval_harness.answers import THINKING_END
from eval_harness.backends import WholePrompts
from eval_harness.loading import load_tasks, quiet_lm_eval
from eval_harness.responses import RecordedLM

SEED = 1234
RESULTS_FILE = "results.json"


class QuietHFLM(WholePrompts, HFLM):
    """lm-eval's transformers model, with three changes besides those of `WholePrompts`.

    No progress bar a batch: `RecordedLM` shows one over all requests. The end of thinking stays in the text where it
    is a special token, which lm-eval leaves out: without it nobody could tell thoughts from the answer. And a stop
    sequence that is a special token ends its own row at once: lm-eval lets the row write on until the whole batch has
    stopped and then, since special tokens are left out of the text, no longer sees where to cut.
    """

    more_than_choice = -1  # the choice's last token is scored, not read

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_generate(self, context, max_length, stop, **generation_options):
        marks = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        known = self.model.generation_config.eos_token_id
        ends = [known] if isinstance(known, int) else list(known or [])
        ends += [marks[text] for text in stop if text in marks and marks[text] not in ends]
        return super()._model_generate(
            context, max_length, stop, **{"eos_token_id": ends or None, **generation_options}
        )

    def tok_decode(self, tokens, skip_special_tokens=True):
        mark = self.tokenizer.convert_tokens_to_ids(THINKING_END)
        if not skip_special_tokens or not isinstance(tokens, list) or mark not in tokens:
            return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)
        end = len(tokens) - tokens[::-1].index(mark)
        thoughts, answer = (super(QuietHFLM, self).tok_decode(part) for part in (tokens[: end - 1], tokens[end:]))
        return f"{thoughts}{THINKING_END}{answer}"


@dataclass
class EvaluationResult:
    """Scores of one run.

    Attributes:
        metrics: task or group -> metric -> score (a share for accuracies, bits for `bits_per_byte`).
        standard_errors: the same keys; missing where lm-eval knows none.
        samples: task -> one record a row: prompt, response, filtered response, metrics.
        num_samples: task or group -> rows that were scored.
        skipped: parts of groups that were left out for want of rows.
        cost: seconds, requests, generated tokens, device.
        raw: everything else that lm-eval returned: task settings, versions, shots.
    """

    metrics: dict[str, dict[str, float]]
    standard_errors: dict[str, dict[str, float]]
    samples: dict[str, list[dict]]
    num_samples: dict[str, int]
    skipped: list[str]
    cost: dict
    raw: dict = field(repr=False)

    def score(self, task: str, metric: str | None = None) -> float:
        """One score of a task or group.

        Raises:
            ValueError: no metric is named and the task has several, or it has no such metric.
        """
        known = self.metrics[task]
        if metric is None and len(known) == 1:
            return next(iter(known.values()))
        if metric not in known:
            raise ValueError(f"{task} has the metrics {', '.join(known)}; name one of them, not {metric!r}")
        return known[metric]

    def save(self, folder: str | Path) -> None:
        """Write `results.json` and `samples/<task>.jsonl`."""
        folder = Path(folder)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        for task, rows in self.samples.items():
            lines = "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
            (folder / "samples" / f"{file_name(task)}.jsonl").write_text(lines, encoding="utf-8")
        names = ("metrics", "standard_errors", "num_samples", "skipped", "cost", "raw")
        content = {name: getattr(self, name) for name in names}
        (folder / RESULTS_FILE).write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def evaluate(
    model: PreTrainedModel | LM | str | Callable[[], LM],
    tokenizer_or_path: PreTrainedTokenizerBase | str | None,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    generation_options: dict | None = None,
    shots: dict[str, int] | None = None,
    task_generation: dict[str, dict] | None = None,
    repeats: int = 1,
    skip_missing: bool = False,
    seed: int = SEED,
    identity: dict | None = None,
) -> EvaluationResult | None:
    """Score a model on tasks.

    Args:
        model: a transformers model on its device, a path or hub name, an lm-eval model, or a function that loads one
            (called once the tasks are there).
        tokenizer_or_path: its tokenizer or where to load it; None with a path (the same place) or an lm-eval model.
        tasks: names of our tasks (the YAML files in `eval_harness/tasks`) or of lm-eval's.
        data_dir: local folder with the tasks' rows; None reads from the hub.
        output_dir: where responses, samples and `results.json` go; a run that was interrupted there goes on. None
            writes nothing.
        limit: rows a task at most, from the top; None scores all.
        batch_size: sequences at a time; changes speed, not greedy answers.
        apply_chat_template: wrap every prompt into the tokenizer's chat template, and score what follows the thinking.
        generation_options: override every task's own, for example `{"max_gen_toks": 64}`.
        shots: worked examples for lm-eval's own tasks by name; our tasks state theirs.
        task_generation: override one task's own, by name.
        repeats: programs a problem of HumanEval and MBPP, for pass@k.
        skip_missing: leave out parts of a group whose rows are missing (the result names them).
        seed: of few-shot draws and sampling.
        identity: what else must agree for the responses in `output_dir` to be used again.

    Returns:
        EvaluationResult, or None on every process but the first of a multi-process run.

    Raises:
        ValueError: an unknown task (the nearest is named), no chat template where one is to be applied, or an output
            folder with a finished run or another model's responses in it.
        MissingDataset: a task's rows are not where they should be.
    """
    folder = Path(output_dir) if output_dir is not None else None
    refuse_finished(folder)
    manager, loaded, skipped = load_tasks(
        tasks, data_dir, apply_chat_template, skip_missing, shots, task_generation, repeats
    )
    if callable(model) and not isinstance(model, PreTrainedModel | LM):
        model = model()
    lm = wrap_model(model, tokenizer_or_path, batch_size)
    if apply_chat_template and not isinstance(model, LM):
        require_chat_template(lm.tokenizer)
    named = {**_identity(model, lm, apply_chat_template, seed), **(identity or {})}
    recorded = RecordedLM(lm, folder, named, batch_size, cut_thinking=apply_chat_template)
    started = time.time()
    try:
        with quiet_lm_eval():
            results = simple_evaluate(
                recorded,
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
    finally:
        recorded.close()
    cost = _cost(recorded, time.time() - started)
    if results is None:
        return None
    result = _collect(results, skipped, cost)
    if folder is not None:
        result.save(folder)
    return result


def wrap_model(
    model: PreTrainedModel | LM | str, tokenizer: PreTrainedTokenizerBase | str | None, batch_size: int, **options
) -> LM:
    """Give lm-eval its view of a transformers model (in evaluation mode); an lm-eval model passes through.

    Args:
        model, tokenizer: as for `evaluate`.
        batch_size: sequences at a time.
        options: of lm-eval's `HFLM`, such as `dtype` or `gguf_file`.

    Raises:
        ValueError: a model object without its tokenizer.
    """
    if isinstance(model, LM):
        return model
    if not isinstance(model, str) and tokenizer is None:
        raise ValueError("tokenizer_or_path is None; give the tokenizer that belongs to the model")
    if isinstance(model, str):
        options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    with quiet_lm_eval():
        return QuietHFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **options)


def require_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: it has none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, so its model is no "
            "instruct model: use the base suite, or attach a template with sft.chat.attach_chat_template"
        )


def refuse_finished(folder: str | Path | None) -> None:
    """Refuse an output folder in which a run has ended.

    Raises:
        ValueError: it holds `results.json`.
    """
    if folder is not None and Path(folder, RESULTS_FILE).exists():
        raise ValueError(f"{folder} holds a finished run; use another output folder, or delete it")


def file_name(task: str) -> str:
    """A task's name as a file name."""
    return task.replace("::", ".").replace("/", "_")


def leaf_tasks(groups: dict[str, list[str]], name: str) -> list[str]:
    """The tasks of a group, through groups within it; a task is its own.

    Args:
        groups: group -> its tasks and groups, lm-eval's `group_subtasks`.
        name: of a group or task.
    """
    children = groups.get(name) or []
    return [leaf for child in children for leaf in leaf_tasks(groups, child)] if children else [name]


def _identity(model, lm: LM, chat: bool, seed: int) -> dict:
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    tokenizer = str(getattr(getattr(lm, "tokenizer", None), "name_or_path", ""))
    dtype = str(getattr(lm, "dtype", ""))
    return {"model": name or type(model).__name__, "tokenizer": tokenizer, "dtype": dtype, "chat": chat, "seed": seed}


def _cost(recorded: RecordedLM, seconds: float) -> dict:
    """What the run took, over all processes; tokens are counted in this run's responses, new or found on file."""
    tokenizer = getattr(recorded.inner, "tokenizer", None)
    texts = [text for text in recorded.used.values() if isinstance(text, str)]
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) if tokenizer is not None and texts else 0
    on_gpu = torch.cuda.is_available() and "cuda" in str(getattr(recorded.inner, "_device", ""))
    counts = torch.tensor([len(recorded.used), recorded.num_reused, tokens])
    if recorded.world_size > 1:
        counts = recorded.all_gather(counts.to(recorded.device)).view(-1, len(counts)).sum(0)
    return {
        "seconds": seconds,
        **dict(zip(("responses", "responses_reused", "generated_tokens"), counts.tolist(), strict=True)),
        "processes": recorded.world_size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _collect(results: dict, skipped: list[str], cost: dict) -> EvaluationResult:
    metrics, errors = {}, {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        scores = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, float | int)}
        if scores:
            metrics[name] = {_metric(key): value for key, value in scores.items() if "_stderr," not in key}
            errors[name] = {_metric(key.replace("_stderr,", ",")): v for key, v in scores.items() if "_stderr," in key}
    samples = results.pop("samples", {})
    counts = {name: count["effective"] for name, count in results["n-samples"].items()}
    groups = results.get("group_subtasks", {})
    counts |= {group: sum(counts.get(leaf, 0) for leaf in leaf_tasks(groups, group)) for group in groups}
    return EvaluationResult(metrics, errors, samples, counts, skipped, cost, raw=results)


def _metric(key: str) -> str:
    """lm-eval's `metric,filter`; the filter is left out where it is the task's own."""
    name, _, chosen = key.partition(",")
    return name if chosen in ("none", "answer") else f"{name},{chosen}"
