"""Settings of a pre-training run: one flat dataclass, filled from a recipe and the command line."""

import math
from dataclasses import dataclass, field, fields
from operator import index
from pathlib import Path
from typing import Literal, get_args

import yaml

from trainer.data.corpus import Source
from trainer.data.curriculum import DomainShare, Mixture, check_reasoning
from trainer.schedules import SCHEDULES, BatchPlan, LearningRateSchedule

MODEL_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_noise_heads",
    "head_dim",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
)

ABOVE_ZERO = (  # where None is the default, it is off
    *("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "rope_theta"),
    *("learning_rate", "adamw_learning_rate", "max_grad_norm", "qk_clip_threshold", "muon_chunk_size"),
    *("sequence_length", "batch_tokens", "batch_tokens_end", "batch_rows_multiple", "shard_tokens", "data_workers"),
    *("gradient_checkpointing_every", "tensor_parallel", "keep_last", "log_steps", "eval_tokens", "peak_tflops"),
    *("spike_deviations", "spike_patience_steps", "timeout_seconds", "reasoning_cap"),
    *("dry_run_gpus", "dry_run_shards", "dry_run_mfu"),
)
AT_LEAST_ZERO = (
    *("weight_decay", "momentum", "max_skipped_steps", "batch_ramp_tokens", "fp8_skip_edge_layers"),
    *("checkpoint_steps", "keep_every_steps", "average_every_tokens", "eval_steps", "exact_logit_steps", "norm_steps"),
    *("spike_window_steps", "spike_min_rise", "max_rewinds"),
    *("warn_noise_share", "warn_memory_rise", "warn_stall_steps", "warn_stall_drop"),
)


def setting(default, text: str):
    """A dataclass field with its line of `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class PretrainConfig:
    """Everything a pre-training run depends on. Field by field, `--help` prints what each one means.

    Raises:
        ValueError: settings that contradict each other; the message names the value and the mend.
    """

    # Where
    output_dir: str = setting("runs/pretrain", "folder of the run: config, metrics, checkpoints, final model")
    overwrite: bool = setting(
        False, "delete what an earlier run left in output_dir; an interrupted run with these settings goes on instead"
    )
    # Model
    model_name_or_path: str | None = setting(None, "checkpoint to continue from; its shape replaces the fields below")
    vocab_size: int | None = setting(
        None, "rows of the embedding, at least the tokenizer's entries; null is just these"
    )
    hidden_size: int = setting(4096, "width of the residual stream")
    intermediate_size: int = setting(16384, "width of the MLP")
    num_hidden_layers: int = setting(40, "decoder layers")
    num_attention_heads: int = setting(40, "query heads, signal and noise together")
    num_key_value_heads: int = setting(16, "key heads, two a group")
    num_noise_heads: int | None = setting(8, "noise heads = groups; null is plain 1:1 differential attention")
    head_dim: int | None = setting(128, "dimension of a head")
    rope_theta: float = setting(1_000_000.0, "base of the rotary embedding")
    max_position_embeddings: int = setting(32_768, "longest sequence the model is declared for")
    tie_word_embeddings: bool = setting(False, "share the embedding with the output head")
    attn_implementation: str = setting(
        "sdpa",
        "attention: sdpa, eager, flex_attention, …; gda_kernel (ours), or gda_fastest (what was measured fastest)",
    )
    polynorm: Literal["auto", "official", "hub", "local", "torch"] = setting(
        "auto", "where PolyNorm's kernel comes from"
    )
    kernels_lock: str | None = setting(None, "file of `kernels lock`: a kernel from the Hub must be as locked")
    trust_kernels: bool = setting(False, "load kernels of publishers whom the Hub does not list as trusted")
    # Data
    tokenizer: str | None = setting(None, "tokenizer: local folder or Hub name (required)")
    data_dir: str | None = setting(None, "folder of token shards; missing domains are tokenised into it (required)")
    domains: dict | str | None = field(
        default=None,
        metadata={
            "help": "mapping of domain to {start, end, anneal, sources}: shares of the mixture, files or Hub names"
        },
    )
    reasoning_domains: list[str] = field(
        default_factory=list, metadata={"help": "domains held to reasoning_cap, in which math must outweigh code"}
    )
    reasoning_cap: float = setting(0.1, "largest share of the reasoning domains together")
    heldout_fraction: float = setting(0.01, "share of documents held out by a hash of their text")
    shard_tokens: int = setting(100_000_000, "tokens of a shard file")
    data_workers: int = setting(1, "processes that tokenise; the shards are the same with any number")
    verify_checksums: bool = setting(True, "compare the checksum of every shard at the start, reading all of it once")
    # Length of the run and of its phases
    total_tokens: int = setting(0, "tokens of the run, padding included (required)")
    annealing_tokens: int = setting(0, "of these, tokens of the annealing phase at the end")
    sequence_length: int = setting(4096, "tokens of a row")
    sequence_length_stages: dict | str | None = field(
        default=None,
        metadata={"help": "longer rows later: mapping of tokens seen to row length, e.g. {4500000000000: 16384}"},
    )
    batch_tokens: int = setting(16_777_216, "tokens of a step, over all ranks")
    batch_tokens_end: int | None = setting(None, "tokens of a step at the end of the ramp")
    batch_ramp_tokens: int = setting(0, "tokens over which the batch grows")
    batch_rows_multiple: int = setting(1, "rows of a step are a multiple of this: the number of ranks must divide it")
    micro_batch_tokens: int | None = setting(None, "tokens of one forward on one rank; null takes all in one")
    # Optimizer
    optimizer: Literal["muon_clip", "adamw"] = setting("muon_clip", "MuonClip, or AdamW for every parameter")
    learning_rate: float = setting(4e-4, "peak learning rate of the matrices")
    adamw_learning_rate: float | None = setting(None, "peak learning rate of everything else; null is the same")
    lr_schedule: Literal["wsd_linear", "wsd_inverse_sqrt", "cosine", "constant"] = setting(
        SCHEDULES[0], "shape of the learning rate over tokens"
    )
    warmup_tokens: int = setting(0, "tokens of the linear warm-up")
    decay_tokens: int = setting(0, "tokens of the decay at the end of a wsd schedule")
    lr_floor: float = setting(0.1, "share of the peak that is left at the end")
    weight_decay: float = setting(0.1, "decoupled weight decay")
    momentum: float = setting(0.95, "momentum of MuonClip")
    qk_clip_threshold: float | None = setting(100.0, "attention logit above which a head is scaled down; null is off")
    qk_clip_rule: Literal["official", "q_only", "compensated"] = setting("official", "how QK-clip scales shared keys")
    muon_chunk_size: int | None = setting(
        1, "large matrices that a rank orthogonalises at once; more takes memory and fewer launches, null takes all"
    )
    muon_copy_engines: bool = setting(
        False, "let the GPUs' copy engines carry matrices instead of NCCL; for the GPUs of one host"
    )
    max_grad_norm: float | None = setting(1.0, "gradient norm is clipped to this; null is off")
    max_skipped_steps: int = setting(
        0, "steps with a non-finite loss or gradient that may be skipped before the run stops"
    )
    # Execution
    seed: int = setting(0, "decides initial weights and the order of the data")
    mixed_precision: Literal["no", "bf16"] = setting("bf16", "precision of the forward pass; weights stay float32")
    residual: Literal["float32", "bfloat16"] = setting(
        "float32", "residual stream under bf16 without FSDP2, which always keeps it in bfloat16"
    )
    fp8: Literal["none", "rowwise", "rowwise_with_gw_hp"] = setting(
        "none",
        "FP8 products in the decoder layers, by torchao; …_gw_hp, the one to compile, takes the weights' gradients in "
        "bfloat16",
    )
    fp8_skip_edge_layers: int = setting(1, "layers at each end that stay out of FP8, besides embedding and head")
    fp8_emulate: bool = setting(False, "compute FP8 products in float32, to try FP8 on other hardware; slow")
    tensor_parallel: int = setting(
        1, "ranks that share each layer's matrices and the same rows, by the model's own plan: 1, or all of the run's"
    )
    compile_layers: bool = setting(False, "compile each decoder layer, and the loss, with torch.compile")
    gradient_checkpointing: Literal["none", "selective", "full"] = setting(
        "none", "recompute layers in the backward pass to save memory; selective keeps products and attention"
    )
    gradient_checkpointing_every: int = setting(1, "recompute only each so many-th layer")
    loss: Literal["auto", "full", "chunked"] = setting(
        "auto", "cross-entropy over all logits at once, or in chunks of the vocabulary; auto: chunks above 1 GiB"
    )
    # Checkpoints
    checkpoint_steps: int = setting(1000, "steps between checkpoints; 0 keeps only the final model")
    async_checkpoints: bool = setting(
        True, "write checkpoints while training goes on; takes host memory for a copy of the states"
    )
    keep_last: int = setting(2, "checkpoints to keep")
    keep_every_steps: int = setting(0, "also keep the checkpoints of every so many steps; 0 keeps none besides")
    average_every_tokens: int = setting(
        0, "tokens after which the mean of the last checkpoints and the weights goes on; 0 is off"
    )
    average_checkpoints: int = setting(6, "how many take part in the mean, the current weights included")
    # Safety
    spike_window_steps: int = setting(128, "recent losses that a spike is measured against; 0 is off (assumption)")
    spike_deviations: float = setting(10.0, "median deviations (MAD, as sigma) above the median (assumption)")
    spike_min_rise: float = setting(0.5, "nats above the median that a spike has at least (assumption)")
    spike_patience_steps: int = setting(3, "such steps in a row before the run rewinds (assumption)")
    max_rewinds: int = setting(
        3, "rewinds to the last checkpoint after a loss spike before the run stops (assumption)"
    )
    timeout_seconds: float = setting(1800.0, "how long a rank waits for the others before the run stops")
    # Watching
    log_steps: int = setting(1, "steps between lines in the terminal and the trackers; metrics.jsonl gets every step")
    eval_steps: int = setting(1000, "steps between held-out evaluations, one at the start and end; 0 is off")
    eval_tokens: int = setting(1_000_000, "held-out tokens of each domain to evaluate on")
    exact_logit_steps: int = setting(
        10,
        "steps between exact maximum logits; in others only those above qk_clip_threshold are exact; 0 is never",
    )
    norm_steps: int = setting(100, "steps between measurements of the signal and noise outputs' norms; 0 is off")
    warn_noise_share: float = setting(
        0.95, "warn when lambda times the noise outputs reaches this share of the signal outputs (assumption)"
    )
    warn_memory_rise: float = setting(0.25, "warn when a step takes this much more memory than usual (assumption)")
    warn_stall_steps: int = setting(
        2000, "warn when the loss fell too little over so many steps; 0 is off (assumption)"
    )
    warn_stall_drop: float = setting(0.001, "nats that the loss must fall in warn_stall_steps (assumption)")
    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "accelerate's trackers: tensorboard, trackio, wandb, …"},
    )
    progress: bool = setting(True, "show a progress bar")
    peak_tflops: float | None = setting(None, "the accelerator's peak in TFLOP/s, for MFU (H100, dense bf16: 989)")
    # Only look
    dry_run: bool = setting(False, "print the resolved settings, parameters, FLOPs, memory and days, then stop")
    dry_run_gpus: int = setting(8, "accelerators to assume in --dry_run")
    dry_run_shards: int | None = setting(
        None, "ranks that share a copy of the states in --dry_run, as in HSDP; null is all of them"
    )
    dry_run_mfu: float = setting(0.4, "model FLOPs utilisation to assume in --dry_run")

    def __post_init__(self):
        self.domains = _mapping("domains", self.domains)
        self.sequence_length_stages = _stages(_mapping("sequence_length_stages", self.sequence_length_stages))
        self._check_required()
        self._check_numbers()
        self._check_ranges()
        self._check_execution()
        check_reasoning(self.shares(), self.reasoning_domains, self.reasoning_cap)
        self.mixture()
        self.batch_plan()
        self.learning_rate_schedule()

    def shares(self) -> dict[str, DomainShare]:
        """The scheduled share of each domain."""
        keys = ("start", "end", "anneal")
        return {
            name: DomainShare(**{key: domain[key] for key in keys if key in domain})
            for name, domain in self.domains.items()
        }

    def mixture(self) -> Mixture:
        """The data mixture over tokens."""
        return Mixture(self.shares(), self.total_tokens - self.annealing_tokens, self.annealing_tokens)

    def batch_plan(self) -> BatchPlan:
        """Row length and rows over tokens."""
        return BatchPlan(
            batch_tokens=self.batch_tokens,
            lengths={0: self.sequence_length, **self.sequence_length_stages},
            batch_tokens_end=self.batch_tokens_end,
            batch_ramp_tokens=self.batch_ramp_tokens,
            rows_multiple=self.batch_rows_multiple,
        )

    def learning_rate_schedule(self) -> LearningRateSchedule:
        """Factor of the learning rate over tokens."""
        return LearningRateSchedule(
            self.lr_schedule, self.total_tokens, self.warmup_tokens, self.decay_tokens, self.lr_floor
        )

    def model_settings(self) -> dict:
        """Keyword arguments of `Motif2Config`."""
        return {name: getattr(self, name) for name in MODEL_FIELDS}

    def to_dict(self) -> dict:
        """The settings as plain values, in the order of the fields; a recipe of them gives this configuration."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def _check_required(self) -> None:
        for name in ("tokenizer", "data_dir", "domains", "total_tokens"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set: give it in the recipe or as --{name}")
        for name, domain in self.domains.items():
            _check_domain(name, domain)
            if "anneal" in domain and not self.annealing_tokens:
                raise ValueError(
                    f"domain {name!r} has an anneal share, and annealing_tokens is 0: set it, or drop anneal"
                )

    def _check_numbers(self) -> None:
        """Each number by itself."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{entry.name} is {value}: use a finite number")
        for name in ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and value <= 0:
                optional = ", or null" if type(None) in get_args(self.__annotations__[name]) else ""
                raise ValueError(f"{name} is {value}: use a value above 0{optional}")
        for name in AT_LEAST_ZERO:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use 0 or more")
        if self.momentum >= 1:
            raise ValueError(f"momentum is {self.momentum}: use a value from 0 to below 1")
        if self.dry_run_mfu > 1:
            raise ValueError(f"dry_run_mfu is {self.dry_run_mfu}: use a share above 0, at most 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: use one from 0 to 2**32 - 1")

    def _check_ranges(self) -> None:
        if self.dry_run_shards is not None and self.dry_run_gpus % self.dry_run_shards:
            raise ValueError(
                f"dry_run_shards is {self.dry_run_shards} of dry_run_gpus {self.dry_run_gpus}: use a number that "
                "divides it"
            )
        if self.checkpoint_steps and self.keep_every_steps % self.checkpoint_steps:
            raise ValueError(
                f"keep_every_steps is {self.keep_every_steps}, when no checkpoint is taken: use a multiple of "
                f"checkpoint_steps {self.checkpoint_steps}"
            )
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction is {self.heldout_fraction}: use a share from 0 to below 1")
        if not 0 <= self.annealing_tokens < self.total_tokens:
            raise ValueError(
                f"annealing_tokens is {self.annealing_tokens}: use less than total_tokens {self.total_tokens}"
            )
        longest = max([self.sequence_length, *self.sequence_length_stages.values()])
        if longest > self.max_position_embeddings:
            raise ValueError(
                f"rows of {longest} tokens exceed max_position_embeddings {self.max_position_embeddings}: raise it"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < longest:
            raise ValueError(
                f"micro_batch_tokens is {self.micro_batch_tokens}, less than one row of {longest} tokens: raise it, "
                "or set null to take all rows at once"
            )
        if bool(self.batch_ramp_tokens) != (self.batch_tokens_end is not None):
            raise ValueError("batch_tokens_end and batch_ramp_tokens belong together: set both or none")
        if self.average_checkpoints < 2:
            raise ValueError(
                f"average_checkpoints is {self.average_checkpoints}, the current weights included: use 2 or more, or "
                "average_every_tokens 0 to average nothing"
            )
        if self.average_every_tokens and not (
            self.checkpoint_steps and self.keep_last >= self.average_checkpoints - 1
        ):
            raise ValueError(
                f"a mean of {self.average_checkpoints} checkpoints needs checkpoint_steps above 0 and keep_last of "
                f"{self.average_checkpoints - 1} or more, got {self.checkpoint_steps} and {self.keep_last}: raise them"
            )

    def _check_execution(self) -> None:
        if self.muon_copy_engines and self.optimizer == "adamw":
            raise ValueError("muon_copy_engines is set, and optimizer adamw moves no matrices: drop one of them")
        if self.fp8 == "rowwise" and self.compile_layers and not self.fp8_emulate:
            raise ValueError(
                "fp8 is 'rowwise' with compile_layers: compiled so, torchao 0.18 gave wrong gradients on an H100 "
                "under PyTorch 2.11; set fp8 rowwise_with_gw_hp, or compile_layers false"
            )
        split = self.tensor_parallel > 1
        if self.dry_run and split and (self.tensor_parallel != self.dry_run_gpus or self.dry_run_shards):
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel} and takes all ranks: reckon with dry_run_gpus "
                f"{self.tensor_parallel} and no dry_run_shards"
            )
        offs = {"compile_layers": False, "fp8": "none", "gradient_checkpointing": "none"}
        for name, off in offs.items():
            if split and getattr(self, name) != off:
                raise ValueError(
                    f"tensor_parallel is {self.tensor_parallel} with {name} {getattr(self, name)}: its layers run as "
                    f"they are; set {name} {str(off).lower()}, or shard with FSDP2 instead"
                )
        if split and self.loss == "chunked":
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel} with loss chunked, and splits the head's words: set loss "
                "full or auto"
            )


def _check_domain(name: str, domain: dict) -> None:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):  # a folder of data_dir
        raise ValueError(f"domain {name!r} is no name for a folder: use letters, digits and _")
    if not isinstance(domain, dict) or not {"start", "end"} <= domain.keys() <= {"start", "end", "anneal", "sources"}:
        raise ValueError(f"domain {name!r} needs start and end, may have anneal and sources, and is {domain!r}")
    for key in domain.keys() - {"sources"}:
        share = domain[key]
        if not isinstance(share, int | float) or not math.isfinite(share):
            raise ValueError(f"{key} of domain {name!r} is {share!r}: write a share from 0 to 1")
    sources = domain.get("sources", [])
    if not isinstance(sources, list):
        raise ValueError(f"sources of domain {name!r} are {sources!r}: write a list, as in [{{path: file.jsonl}}]")
    for source in sources:
        Source.parse(source)


def _mapping(name: str, value: dict | str | None) -> dict:
    """A mapping from a recipe, or written as YAML or JSON on the command line."""
    try:
        value = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read as YAML: {error}") from error
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    return value or {}


def _stages(stages: dict) -> dict[int, int]:
    """Tokens seen to row length; in JSON the former are text."""
    try:
        whole = {int(start) if isinstance(start, str) else index(start): index(stages[start]) for start in stages}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"sequence_length_stages is {stages}: write whole numbers, tokens seen to row length"
        ) from error
    if min(whole, default=1) < 1:
        raise ValueError(f"sequence_length_stages is {stages}: write stages after 0, where sequence_length holds")
    return whole
