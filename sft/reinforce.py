"""Beyond the report: DPO or GRPO on verifiable arithmetic, with the same optimizer and kernels.

`python -m sft.reinforce --config recipes/sft/grpo_arithmetic.yaml`. TRL trains; the problems, the check of
an answer and the wrong answers that DPO learns to avoid are made here.
"""

import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from kernels_hub import use_polynorm
from sft.callbacks import MetricsCallback
from sft.checkpoints import ResumeRules, changed_settings, claim_output_dir
from sft.config import KERNEL_SOURCES
from sft.export import CONFIG_FILE, METRICS_FILE, save_final_model
from sft.files import write_text
from sft.guards import GuardedSteps
from sft.stage import load_model, load_tokenizer
from trainer.cli import parse_recipe
from trainer.data.arithmetic import Problem, generate_problems
from trainer.errors import CheckpointError
from trainer.optim import MuonClipFactory

METHODS = ("dpo", "grpo")
RESUME_RULES = ResumeRules(
    applied=frozenset({"learning_rate", "beta"}),
    free=frozenset(
        {"output_dir", "resume", "dry_run", "save_steps", "kernels", "kernels_lock", "trust_kernels", "use_cpu"}
    ),
)


@dataclass
class ReinforceConfig:
    """Settings of a run; the numbers are an assumption.

    Raises:
        ValueError: a value is out of range.
    """

    method: str = field(default="grpo", metadata={"help": "dpo (pairs) or grpo (reward of sampled answers)"})
    model_name_or_path: str = field(default="", metadata={"help": "fine-tuned model to start from"})
    output_dir: str = field(default="", metadata={"help": "folder of the run: model/ and metrics.jsonl"})
    num_problems: int = field(default=2000, metadata={"help": "arithmetic problems, of the training split"})
    max_steps: int = field(default=100, metadata={"help": "updates"})
    batch_size: int = field(default=16, metadata={"help": "pairs, or sampled answers, an update and device"})
    num_generations: int = field(default=8, metadata={"help": "answers sampled a problem (grpo); divides batch_size"})
    max_answer_tokens: int = field(default=96, metadata={"help": "longest sampled answer (grpo)"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of MuonClip"})
    beta: float = field(default=0.1, metadata={"help": "strength of the pull towards the first model"})
    kernels: str = field(default="auto", metadata={"help": "PolyNorm kernel: auto, official, hub, local or torch"})
    kernels_lock: str = field(
        default="", metadata={"help": "file of `kernels lock`: a kernel from the Hub must be as locked"}
    )
    trust_kernels: bool = field(
        default=False, metadata={"help": "load kernels of publishers whom the Hub does not list as trusted"}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast"})
    use_cpu: bool = field(default=False, metadata={"help": "train on the CPU although an accelerator is there"})
    seed: int = field(default=0, metadata={"help": "seed of problems and sampling"})
    save_steps: int = field(default=0, metadata={"help": "updates between checkpoints; two are kept; 0: none"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest complete checkpoint in output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "print the settings and a first example, and exit"})

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; use one of {', '.join(METHODS)}")
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; set it in the recipe or on the command line")
        for name in ("num_problems", "max_steps", "batch_size", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.kernels not in KERNEL_SOURCES:
            raise ValueError(f"kernels is {self.kernels!r}; use one of {', '.join(KERNEL_SOURCES)}")
        if self.save_steps < 0:
            raise ValueError(f"save_steps is {self.save_steps}; use 0 or more")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.beta < math.inf:
            raise ValueError(
                f"learning_rate is {self.learning_rate} and beta {self.beta}; use a rate above 0, and 0 or more"
            )
        if self.method == "grpo" and (self.num_generations < 2 or self.batch_size % self.num_generations):
            raise ValueError(
                f"num_generations is {self.num_generations} and batch_size {self.batch_size}; use 2 or more that "
                "divide batch_size"
            )


class WithReference(GuardedSteps):
    """Mixed into TRL's trainers that compare with the model as it was at first."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # TRL loads that model by these: under FSDP it would spread it over all GPUs that a process sees.
        self.args.model_init_kwargs = {"device_map": None}


class PreferenceTrainer(WithReference, DPOTrainer):
    """TRL's DPO, guarded."""


class RewardTrainer(WithReference, GRPOTrainer):
    """TRL's GRPO, guarded."""


def answer_reward(completions: list[list[dict]], answer: list[int], **kwargs) -> list[float]:
    """1 for an answer that ends with `#### ` and the right number, else 0.

    Args:
        completions: sampled answers as lists of messages.
        answer: the known number of each.
    """
    return [
        float(completion[-1]["content"].strip().endswith(f"#### {number}"))
        for completion, number in zip(completions, answer, strict=True)
    ]


def preference_pairs(problems: list[Problem], seed: int) -> Dataset:
    """Prompt, the worked solution, and the same with a wrong result in its last equation and its answer."""
    rng = random.Random(seed)
    rows = []
    for problem in problems:
        wrong = problem.answer + rng.choice([-10, -2, -1, 1, 2, 10])
        head, _, _ = problem.solution.rpartition(f"= {problem.answer}.")
        rejected = f"{head}= {wrong}.\n#### {wrong}"
        rows.append(
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": problem.solution}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return Dataset.from_list(rows)


def run_reinforce(config: ReinforceConfig) -> Path:
    """Train as the settings say; returns the folder of the model.

    Raises:
        ValueError: the output folder holds a run, a continuation's settings differ from the run's, or the model has no
            weights or no tokenizer with Motif's markup.
        FloatingPointError: a loss or gradient is no number.
        CheckpointError: a checkpoint or the model could not be written.
    """
    output_dir = Path(config.output_dir)
    checkpoint, notes = claim_output_dir(output_dir, config.resume)
    if checkpoint is not None:
        changed = changed_settings(config, output_dir / CONFIG_FILE, RESUME_RULES)
        notes = [f"goes on from {checkpoint}", *(f"passed over {line}" for line in notes), *changed]
    tokenizer = load_tokenizer(config.model_name_or_path)
    trainer = build_reinforce_trainer(config, tokenizer)
    trainer.accelerator.wait_for_everyone()  # every rank has compared the file that is now written
    if trainer.is_world_process_zero():
        write_text(yaml.safe_dump(asdict(config), sort_keys=False), output_dir / CONFIG_FILE)
        print(*notes, sep="\n")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return save_final_model(trainer, tokenizer, config)


def build_reinforce_trainer(
    config: ReinforceConfig, tokenizer: PreTrainedTokenizerBase
) -> PreferenceTrainer | RewardTrainer:
    """TRL's trainer of the method, on arithmetic, with MuonClip and the kernels."""
    model = load_model(config.model_name_or_path, tokenizer)
    use_polynorm(model, config.kernels, lockfile=config.kernels_lock, trust_remote_code=config.trust_kernels)
    problems = generate_problems(config.seed, config.num_problems)
    common = {
        "model": model,
        "processing_class": tokenizer,
        "callbacks": [MetricsCallback(Path(config.output_dir) / METRICS_FILE)],
    }
    if config.method == "dpo":
        trainer = PreferenceTrainer(
            args=_arguments(config, DPOConfig), train_dataset=preference_pairs(problems, config.seed), **common
        )
    else:
        sampling = {"num_generations": config.num_generations, "max_completion_length": config.max_answer_tokens}
        rows = [
            {"prompt": [{"role": "user", "content": problem.question}], "answer": problem.answer}
            for problem in problems
        ]
        trainer = RewardTrainer(
            args=_arguments(config, GRPOConfig, **sampling),
            train_dataset=Dataset.from_list(rows),
            reward_funcs=answer_reward,
            **common,
        )
    # GRPOTrainer has no argument for it; transformers' Trainer reads the attribute when it makes the optimizer.
    trainer.optimizer_cls_and_kwargs = (MuonClipFactory, {"lr": config.learning_rate})
    return trainer


def _arguments(config: ReinforceConfig, kind: type, **more):
    return kind(
        output_dir=str(Path(config.output_dir) / "checkpoints"),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        beta=config.beta,
        bf16=config.bf16,
        use_cpu=config.use_cpu,
        seed=config.seed,
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def describe_reinforce(config: ReinforceConfig) -> str:
    """What `run_reinforce` would do: the settings and a first example; no model is read, nothing is written."""
    (problem,) = generate_problems(config.seed, 1)
    lines = [yaml.safe_dump(asdict(config), sort_keys=False)]
    if config.method == "dpo":
        (pair,) = preference_pairs([problem], config.seed)
        lines += [f"[{side}]\n{pair[side][0]['content']}\n" for side in ("prompt", "chosen", "rejected")]
    else:
        lines.append(f"[prompt]\n{problem.question}\n[rewarded]\n… #### {problem.answer}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Train as a recipe says, or say what would be done (`--dry_run`).

    Raises:
        SystemExit: a setting, model or output folder cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(ReinforceConfig, description=__doc__, argv=argv)
    if config.dry_run:
        print(describe_reinforce(config))
        return
    try:
        print(f"model in {run_reinforce(config)}")
    except (ValueError, OSError, FloatingPointError, CheckpointError) as error:
        raise SystemExit(f"sft.reinforce: {error}") from error


if __name__ == "__main__":
    main()
