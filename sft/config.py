"""Settings of one fine-tuning stage: a flat dataclass, filled by a recipe and the command line."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from sft.checkpoints import ResumeRules
from sft.files import write_text

OPTIMIZERS = ("muon_clip", "adamw")
DTYPES = ("float32", "bfloat16")
# Those of transformers that need no further settings.
LR_SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "inverse_sqrt",
    "polynomial",
)
FP8_RECIPES = ("none", "rowwise", "rowwise_with_gw_hp")
KERNEL_SOURCES = ("auto", "official", "hub", "local", "torch")
ROW_RULES = ("skip", "refuse")
LENGTH_RULES = ("skip", "truncate", "refuse")
RESUME_RULES = ResumeRules(
    applied=frozenset({"learning_rate", "adamw_learning_rate", "weight_decay", "max_grad_norm", "qk_clip_threshold"}),
    free=frozenset(
        {
            *("output_dir", "resume", "dry_run", "progress", "preview_samples", "report_to", "logging_steps"),
            *(
                "save_steps",
                "save_total_limit",
                "eval_files",
                "eval_steps",
                "eval_tasks",
                "eval_data_dir",
                "eval_limit",
            ),
            *("push_to_hub", "hub_private", "license"),
            *("kernels", "kernels_lock", "trust_kernels", "attn_implementation", "gradient_checkpointing", "use_cpu"),
        }
    ),
)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _field(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class SftStageConfig:
    """One stage. Defaults are stage 1 of arXiv 2511.07464, post-training, but for the batch, which fits one device.

    Raises:
        ValueError: a value is out of range or two settings contradict each other; the message names the mend.
    """

    model_name_or_path: str = _field("", "folder or Hub name of the model and tokenizer to start from")
    output_dir: str = _field("", "folder of the run: model/, metrics.jsonl, config.yaml, checkpoints/ …")
    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "conversations: .jsonl, .jsonl.zst or .parquet files with a `messages` column"},
    )
    eval_files: list[str] = field(
        default_factory=list,
        metadata={"help": "held-out conversations; their loss is measured before and after"},
    )
    max_samples: int = _field(0, "keep only so many conversations after shuffling; 0 keeps all")
    bad_rows: str = _field("skip", "skip: malformed rows are counted and left out; refuse: the first one stops")
    long_samples: str = _field("skip", "skip, truncate or refuse conversations longer than max_length tokens")
    max_characters: int = _field(1_000_000, "rows with more text than this are malformed (assumption)")

    max_length: int = _field(16_384, "tokens of a packed sequence, and of the longest conversation")
    packing: bool = _field(True, "pack several conversations into one sequence; they do not see each other")
    per_device_batch_size: int = _field(1, "sequences a device and micro-step")
    gradient_accumulation_steps: int = _field(1, "micro-steps an update; leave 1 when global_batch_tokens is set")
    global_batch_tokens: int = _field(0, "tokens an update over all devices; 0: given by the two settings above")
    num_epochs: float = _field(1.0, "passes over the data; max_steps wins")
    max_steps: int = _field(-1, "updates; -1: given by num_epochs")

    optimizer: str = _field("muon_clip", "muon_clip, or adamw (for LoRA)")
    learning_rate: float = _field(2e-5, "peak learning rate")
    adamw_learning_rate: float = _field(
        0.0, "peak for embeddings, head, norms and other vectors under muon_clip; 0: as learning_rate"
    )
    weight_decay: float = _field(0.1, "decoupled weight decay")
    warmup_ratio: float = _field(0.05, "share of the updates with a rising learning rate")
    lr_scheduler: str = _field("cosine", f"shape after the warm-up: {', '.join(LR_SCHEDULERS)}")
    max_grad_norm: float = _field(1.0, "gradients are scaled down to this norm")
    qk_clip_threshold: float = _field(100.0, "heads whose largest attention logit exceeds this are clipped")

    lora_rank: int = _field(0, "rank of LoRA adapters; 0 trains all parameters")
    lora_alpha: int = _field(32, "LoRA scale times rank")
    lora_dropout: float = _field(0.0, "LoRA dropout")
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "modules that get an adapter"}
    )

    kernels: str = _field("auto", "PolyNorm kernel: auto, official, hub, local or torch")
    kernels_lock: str = _field("", "file of `kernels lock`: a kernel from the Hub must be as locked")
    trust_kernels: bool = _field(False, "load kernels of publishers whom the Hub does not list as trusted")
    dtype: str = _field("bfloat16", "bfloat16 (autocast over float32 parameters) or float32")
    fp8: str = _field("none", "none, rowwise or rowwise_with_gw_hp: products of the decoder layers in FP8 (torchao)")
    fp8_skip_edge_layers: int = _field(1, "layers at each end that stay out of FP8, besides embedding and head")
    fp8_emulate: bool = _field(False, "compute FP8 products in float32, to try FP8 on other hardware; slow")
    attn_implementation: str = _field("sdpa", "gda_fastest, gda_kernel (our kernel), or transformers': sdpa, eager …")
    gradient_checkpointing: bool = _field(True, "recompute activations in the backward pass")
    use_cpu: bool = _field(False, "train on the CPU although an accelerator is there")

    eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "tasks of eval_harness to run before and after the stage"}
    )
    eval_data_dir: str = _field("", "local folder with the tasks' rows; empty: from the Hub")
    eval_limit: int = _field(0, "rows a task; 0: all")

    push_to_hub: str = _field("", "repository (you/name) that the model, its card and tokenizer go to at the end")
    hub_private: bool = _field(False, "make that repository private where it does not exist yet")
    license: str = _field("", "licence of the weights, as the Hub names it; empty: not stated")

    seed: int = _field(0, "seed of shuffling, sampling and adapters")
    logging_steps: int = _field(1, "updates between lines of metrics.jsonl")
    eval_steps: int = _field(0, "updates between evaluations on eval_files; 0: only before and after")
    save_steps: int = _field(0, "updates between checkpoints; 0: none")
    save_total_limit: int = _field(2, "checkpoints kept")
    resume: bool = _field(False, "go on from the newest complete checkpoint in output_dir")
    preview_samples: int = _field(2, "conversations printed with their loss mask before training")
    progress: bool = _field(True, "show a progress bar")
    report_to: str = _field("none", "tracker that transformers knows: none, tensorboard, wandb …")
    dry_run: bool = _field(False, "print the resolved settings, sizes, samples with loss mask, and exit")

    def __post_init__(self):
        for name, known in (
            ("bad_rows", ROW_RULES),
            ("long_samples", LENGTH_RULES),
            ("optimizer", OPTIMIZERS),
            ("lr_scheduler", LR_SCHEDULERS),
            ("kernels", KERNEL_SOURCES),
            ("dtype", DTYPES),
            ("fp8", FP8_RECIPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        for name in ("model_name_or_path", "output_dir", "train_files"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; set it in the recipe or on the command line")
        self._check_numbers()
        self._check_tracker()
        if self.eval_steps and not self.eval_files:
            raise ValueError(f"eval_steps is {self.eval_steps} and eval_files is empty; name files, or set it to 0")
        if self.adamw_learning_rate and self.optimizer == "adamw":
            raise ValueError(
                f"adamw_learning_rate is {self.adamw_learning_rate} with optimizer adamw, which has one rate; set "
                "learning_rate"
            )
        if self.lora_rank and self.optimizer == "muon_clip":
            raise ValueError(
                f"lora_rank is {self.lora_rank} with optimizer muon_clip, whose QK-clip rescales "
                "the q_proj and k_proj that LoRA freezes; set optimizer: adamw"
            )
        if self.lora_rank and self.fp8 != "none":
            raise ValueError(
                f"lora_rank is {self.lora_rank} with fp8 {self.fp8}; adapters train without: set fp8 none"
            )
        if self.global_batch_tokens and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"global_batch_tokens ({self.global_batch_tokens}) and gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}) both set the batch; leave one of them at its default"
            )

    def _check_tracker(self):
        if self.report_to == "none":
            return
        from transformers.integrations import get_available_reporting_integrations

        known = get_available_reporting_integrations()
        if self.report_to not in known:
            raise ValueError(
                f"report_to is {self.report_to!r}, no tracker that is installed here; install it, or use "
                f"{', '.join(['none', *known])}"
            )

    def _check_numbers(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; use a finite number")
        for name in ("max_length", "max_characters", "per_device_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in ("logging_steps", "save_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in (
            "eval_limit",
            "max_samples",
            "global_batch_tokens",
            "lora_rank",
            "eval_steps",
            "fp8_skip_edge_layers",
            "save_steps",
            "preview_samples",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        for name in ("learning_rate", "max_grad_norm", "qk_clip_threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use a number above 0")
        for name in ("weight_decay", "adamw_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; use a share of the updates, from 0 to below 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}; use 0 to {(1 << 32) - 1}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; use 0 to below 1")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps is {self.max_steps}; use 1 or more, or -1 for num_epochs")
        if self.max_steps == -1 and not self.num_epochs > 0:
            raise ValueError(f"num_epochs is {self.num_epochs}; use a number above 0, or set max_steps")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-steps an update, given the number of devices.

        Raises:
            ValueError: global_batch_tokens is not a whole number of micro-steps.
        """
        if not self.global_batch_tokens:
            return self.gradient_accumulation_steps
        micro_step_tokens = self.per_device_batch_size * self.max_length * world_size
        if self.global_batch_tokens % micro_step_tokens:
            nearest = max(1, round(self.global_batch_tokens / micro_step_tokens)) * micro_step_tokens
            raise ValueError(
                f"global_batch_tokens is {self.global_batch_tokens}, not a multiple of per_device_batch_size * "
                f"max_length * devices = {micro_step_tokens}; use {nearest}"
            )
        return self.global_batch_tokens // micro_step_tokens

    def batch_tokens(self, world_size: int) -> int:
        """Most tokens an update sees, over all devices."""
        return self.per_device_batch_size * self.max_length * world_size * self.accumulation_steps(world_size)

    def save(self, path: str | Path) -> None:
        """Write every setting as a recipe that `--config` reads back."""
        write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), path)
