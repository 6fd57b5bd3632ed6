"""The README.md of a saved model: what it is, how it was made, its licence, and its evaluation if there is one."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CODE_LICENSE = "Apache-2.0"
REPORT = "arXiv:2511.07464"
TAGS = ("motif2", "grouped-differential-attention", "polynorm")

USE = """```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/or/repository", {argument})
tokenizer = AutoTokenizer.from_pretrained("path/or/repository")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print({shown})
```"""
# What a model is for, by the end of its class's name: the Hub's task, transformers' class, what the example prints.
TASKS = {
    "ForCausalLM": (
        "text-generation",
        "AutoModelForCausalLM",
        "tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0])",
    ),
    "ForSequenceClassification": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "model(**inputs).logits",
    ),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "model(**inputs).logits"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering", "model(**inputs).start_logits"),
    "Model": ("feature-extraction", "AutoModel", "model(**inputs).last_hidden_state"),
}


def write_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    num_parameters: int | None = None,
    description: str | None = None,
    training: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    language: list[str] | None = None,
    tags: list[str] | None = None,
    evaluation: dict[str, dict[str, float]] | None = None,
) -> Path:
    """Writes README.md into a saved folder, over one that is there.

    Args:
        folder: has the config.json that `save_pretrained` wrote.
        name: title; default: the folder's name.
        num_parameters: parameters in all.
        description: what the model is for, in Markdown.
        training: how it was made, in Markdown.
        license: identifier of the weights' licence on the Hub.
        base_model: repository that it was fine-tuned from.
        datasets: repositories of its data.
        language: language codes.
        tags: on the Hub, beside those that every card of this model has.
        evaluation: {task: {metric: value}}.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    name = name or folder.resolve().name
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=metric, metric_value=value
        )
        for task, metrics in (evaluation or {}).items()
        for metric, value in metrics.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(config)[0],
        license=license,
        base_model=base_model,
        datasets=datasets,
        language=language,
        tags=list(dict.fromkeys([*TAGS, *(tags or [])])),
        model_name=name if results else None,
        eval_results=results or None,
    )
    sections = [
        f"# {name}",
        _what_it_is(config, num_parameters, description),
        "## Use\n\n" + _use(config),
        "## How it was made\n\n" + (training or "Not recorded by whoever saved this model."),
        "## Evaluation\n\n" + (_table(evaluation) if evaluation else "None recorded."),
        "## Licence\n\n" + _licence(license),
    ]
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(path)
    return path


def _task(config: dict) -> tuple[str, str, str]:
    """The entry of `TASKS` that the configuration's class has; a language model's where it names none."""
    (architecture,) = config.get("architectures") or ["Motif2ForCausalLM"]
    return next(entry for name, entry in TASKS.items() if architecture.endswith(name))


def _what_it_is(config: dict, num_parameters: int | None, description: str | None) -> str:
    heads = config["num_attention_heads"]
    groups = config.get("num_noise_heads") or heads // 2
    # In the form for engines a group's queries are repeated: r for each of 4 keys.
    signal = heads // 4 if config.get("single_attention_call") else heads - groups
    attention = f"{signal} signal and {groups} noise heads in {groups} groups"
    size = "" if num_parameters is None else f"{num_parameters / 1e9:.3g} B parameters, "
    facts = (
        f"A Motif-2 model: {size}{config['num_hidden_layers']} layers of width {config['hidden_size']}, "
        f"grouped differential attention ({attention}), PolyNorm, {config['vocab_size']:,} tokens ({REPORT})."
    )
    return facts if description is None else f"{facts}\n\n{description}"


def _use(config: dict) -> str:
    _, auto, shown = _task(config)
    if config["model_type"] == "motif2":
        text = "With the `motif2` package, `import modeling_motif2` first and leave `trust_remote_code` out."
        argument = "trust_remote_code=True"
    else:
        text = "This folder is in the official layout and has no sources: `import modeling_motif2` first."
        argument = 'dtype="auto"'
    return USE.format(auto=auto, argument=argument, shown=shown) + "\n\n" + text


def _table(evaluation: dict[str, dict[str, float]]) -> str:
    rows = [
        f"| {task} | {metric} | {value:.4g} |" for task, row in evaluation.items() for metric, value in row.items()
    ]
    return "\n".join(["| task | metric | value |", "|---|---|---:|", *rows])


def _licence(license: str | None) -> str:
    weights = f"Weights: {license}." if license else "Weights: not stated by whoever saved this model."
    return f"{weights} Code in this folder: {CODE_LICENSE}."


__all__ = ["write_model_card"]
