"""Few-shot examples of the published protocols, taken from where they lie: lm-eval's own tasks, or the dataset."""

from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.minerva_math.utils import list_fewshot_samples

MBPP_EXAMPLES = (2, 3, 4)


def gsm8k_examples() -> list[dict]:
    """The eight worked problems of chain-of-thought prompting (`question`, `target`); 4-shot takes the first four.

    Source: arXiv 2201.11903, appendix; as lm-eval's `gsm8k_cot` holds them.
    """
    path = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    return load_yaml(path)["fewshot_config"]["samples"]


def math_examples() -> list[dict]:
    """The four worked problems of Minerva (`problem`, `solution`).

    Source: arXiv 2206.14858, appendix D; as lm-eval's `minerva_math` holds them.
    """
    return list_fewshot_samples()


def mbpp_examples(dataset: datasets.Dataset) -> list[dict]:
    """The three problems that MBPP's authors prompt with: tasks 2, 3 and 4 of the split `prompt`.

    Source: arXiv 2108.07732, section 3.
    """
    rows = {row["task_id"]: row for row in dataset}
    return [rows[number] | {"code": rows[number]["code"].replace("\r\n", "\n")} for number in MBPP_EXAMPLES]


def mmlu_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    """lm-eval `process_docs`: columns `header` (names the subject) and `prompt` (question, choices, "Answer:").

    Source: arXiv 2009.03300, section 4.
    """

    headers = [
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for subject in dataset["subject"]
    ]
    prompts = [
        "\n".join([question.strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))])
        + "\nAnswer:"
        for question, choices in zip(dataset["question"], dataset["choices"], strict=True)
    ]
    return dataset.add_column("header", headers).add_column("prompt", prompts)
