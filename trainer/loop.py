"""The pre-training run: data, model and optimizer are put together, then step after step until the last token."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

from kernels_hub import use_polynorm
from trainer.checkpoint import Checkpoints
from trainer.config import PretrainConfig
from trainer.data.loader import Batch, CurriculumLoader, heldout_batches
from trainer.data.shards import TokenCorpus, build_shards, check_tokenizer, load_manifest
from trainer.flops import training_flops
from trainer.metrics import Metrics, peak_memory_bytes
from trainer.model import build_model, load_tokenizer
from trainer.optim import build_muon_clip
from trainer.run_folder import CHECKPOINTS, METRICS, export_model, open_run_folder
from trainer.step import NonFiniteLossError, StepOutcome, TrainStep


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run leaves.

    Args:
        output_dir: of the run.
        model_dir: final model and tokenizer, for `from_pretrained`.
        metrics_path: `metrics.jsonl`.
        steps, tokens: length of the run.
        first_eval, last_eval: held-out loss by domain before and after training; empty when eval_steps is 0.
    """

    output_dir: Path
    model_dir: Path
    metrics_path: Path
    steps: int
    tokens: int
    first_eval: dict[str, float]
    last_eval: dict[str, float]


@dataclass
class Progress:
    """Where a run stands; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)


def run_pretraining(config: PretrainConfig) -> PretrainResult:
    """Pre-train a Motif-2 model, from its last checkpoint if the run was interrupted.

    Args:
        config: all settings; `config.output_dir` gets everything the run writes.

    Raises:
        ValueError: the output folder, corpus, tokenizer or checkpoint does not fit the settings.
        NonFiniteLossError: more than `max_skipped_steps` steps had a non-finite loss or gradient.
    """
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # an earlier run of this process may have used another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.accelerator.is_available(),  # else accelerate takes gloo ranks for single processes
        log_with=config.trackers or None,
        project_dir=config.output_dir,
    )
    try:
        return _Run(config, accelerator).train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def prepare_shards(config: PretrainConfig, tokenizer, accelerator: Accelerator) -> None:
    """Tokenise the domains that `data_dir` lacks, on the main process, and refuse another tokenizer's shards.

    Raises:
        ValueError: a domain has neither shards nor sources, a source cannot be read, or the tokenizer differs.
    """
    with accelerator.main_process_first():
        if accelerator.is_main_process and any(domain.get("sources") for domain in config.domains.values()):
            sources = {name: domain["sources"] for name, domain in config.domains.items() if domain.get("sources")}
            build_shards(
                config.data_dir,
                sources,
                tokenizer,
                heldout_fraction=config.heldout_fraction,
                shard_tokens=config.shard_tokens,
                seed=0,
                progress=config.progress,
            )
    load_manifest(config.data_dir)
    check_tokenizer(config.data_dir, tokenizer)


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """MuonClip over the model, or AdamW for all of it (then nothing is clipped).

    Args:
        config: of the run.
        model: not yet prepared by accelerate.
    """
    options = {"lr": config.learning_rate, "adamw_lr": config.adamw_learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        decays = {"other": config.weight_decay}
        return build_muon_clip(model, adamw_patterns=(".*",), weight_decays=decays, qk_clip_threshold=None, **options)
    return build_muon_clip(
        model,
        momentum=config.momentum,
        qk_clip_threshold=config.qk_clip_threshold,
        qk_clip_rule=config.qk_clip_rule,
        **options,
    )


class _Run:
    def __init__(self, config: PretrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = open_run_folder(config, accelerator)
        self.tokenizer = load_tokenizer(config.tokenizer)
        prepare_shards(config, self.tokenizer, accelerator)
        self.loader = self._open_loader()
        self.heldout = self._open_heldout()
        self.schedule = config.learning_rate_schedule()
        set_seed(config.seed)
        model = build_model(config, self.tokenizer)
        self.model_config = model.config
        use_polynorm(model.to(accelerator.device), config.polynorm)  # refuses a kernel that does not run
        optimizer = build_optimizer(config, model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.step = TrainStep(
            accelerator,
            self.model,
            self.optimizer,
            list(config.domains),
            config.max_grad_norm,
            config.micro_batch_tokens,
        )
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, accelerator, config.keep_last)
        self.progress = Progress()

    def train(self) -> PretrainResult:
        """Run to the last token and export the model."""
        accelerator, config = self.accelerator, self.config
        if config.trackers:
            accelerator.init_trackers("pretrain")
        metrics_path = self.folder / METRICS
        self.metrics = Metrics(metrics_path, accelerator, config.total_tokens, config.log_steps, config.progress)
        try:
            self._resume(metrics_path)
            if not self.progress.step:
                self._evaluate()
            while self.progress.tokens < config.total_tokens:
                self._train_step()
            model_dir = self._finish()
        finally:
            self.loader.close()
            self.metrics.close()
            for tracker in accelerator.trackers:
                tracker.finish()
        progress = self.progress
        return PretrainResult(
            self.folder,
            model_dir,
            metrics_path,
            progress.step,
            progress.tokens,
            progress.first_eval,
            progress.last_eval,
        )

    def _train_step(self) -> None:
        config, progress = self.config, self.progress
        started = time.perf_counter()
        batch = self.loader.next_batch()
        waited = time.perf_counter() - started
        progress.tokens += batch.nominal_tokens
        factor = self.schedule.factor(progress.tokens)
        outcome = self.step.run(batch, factor)
        progress.step += 1
        self.metrics.step(self._describe(batch, outcome, factor, time.perf_counter() - started, waited))
        if outcome.skipped:
            self._count_skipped(outcome)
        finished = progress.tokens >= config.total_tokens
        if config.eval_steps and (finished or progress.step % config.eval_steps == 0):
            self._evaluate()
        if config.checkpoint_steps and (finished or progress.step % config.checkpoint_steps == 0):
            state = {**vars(progress), "loader": batch.state}
            self.checkpoints.save(self.model, self.optimizer, state)

    def _describe(self, batch: Batch, outcome: StepOutcome, factor: float, seconds: float, waited: float) -> dict:
        """A line of metrics.jsonl."""
        config, progress = self.config, self.progress
        real_tokens = sum(batch.tokens_by_domain.values())
        entry = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": outcome.loss,
            "loss_by_domain": outcome.loss_by_domain,
            "learning_rate": config.learning_rate * factor,
            "mixture": batch.weights,
            "realised": {name: tokens / real_tokens for name, tokens in batch.tokens_by_domain.items()},
            "epochs": {name: stream["next_document"] for name, stream in batch.state["streams"].items()},
            "padding_share": 1 - real_tokens / batch.nominal_tokens,
            "sequence_length": batch.input_ids.shape[1],
            "grad_norm": outcome.grad_norm,
            "max_logits": outcome.max_logits,
            "lambdas": outcome.lambdas,
            "clipped_heads": outcome.clipped_heads,
            "skipped": outcome.skipped,
            "seconds": seconds,
            "data_wait_seconds": waited,
            "tokens_per_second": batch.nominal_tokens / seconds,
        }
        for name, stream in self.loader.streams.items():
            entry["epochs"][name] /= stream.corpus.num_documents
        if config.peak_tflops:
            flops = training_flops(self.model_config, batch.nominal_tokens, batch.attention_pairs)
            entry["mfu"] = flops / seconds / (config.peak_tflops * 1e12 * self.accelerator.num_processes)
        memory = peak_memory_bytes()
        if memory is not None:
            entry["peak_memory_bytes"] = memory
        return entry

    def _count_skipped(self, outcome: StepOutcome) -> None:
        self.progress.skipped_steps += 1
        if self.progress.skipped_steps > self.config.max_skipped_steps:
            raise NonFiniteLossError(
                f"step {self.progress.step} has loss {outcome.loss} and gradient norm {outcome.grad_norm}, and "
                f"max_skipped_steps is {self.config.max_skipped_steps}; the last checkpoint is "
                f"{self.checkpoints.latest()}: lower learning_rate or lengthen warmup_tokens"
            )

    def _evaluate(self) -> None:
        if not self.heldout:
            return
        losses = {name: self.step.evaluate(batches) for name, batches in self.heldout.items()}
        self.progress.first_eval = self.progress.first_eval or losses
        self.progress.last_eval = losses
        self.metrics.evaluation({"step": self.progress.step, "tokens": self.progress.tokens, "eval": losses})

    def _resume(self, metrics_path: Path) -> None:
        path = self.checkpoints.latest()
        if path is None:
            self.metrics.resume(metrics_path, -1, 0)
            return
        state = self.checkpoints.load(path, self.model, self.optimizer)
        self.loader.load_state_dict(state.pop("loader"))
        self.progress = Progress(**state)
        self.metrics.resume(metrics_path, self.progress.step, self.progress.tokens)
        self.metrics.say(f"going on from {path}: step {self.progress.step}, {self.progress.tokens:,} tokens seen")

    def _finish(self) -> Path:
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            export_model(self.accelerator.unwrap_model(self.model), state_dict, self.tokenizer, self.folder)
        self.accelerator.wait_for_everyone()
        return self.folder / "model"

    def _open_loader(self) -> CurriculumLoader:
        config, ranks = self.config, self.accelerator.num_processes
        plan = config.batch_plan()
        if plan.shape(0)[1] % ranks or (config.batch_tokens_end and config.batch_rows_multiple % ranks):
            raise ValueError(
                f"a step of {plan.shape(0)[1]} rows cannot be shared evenly by {ranks} ranks: set batch_tokens or "
                "batch_rows_multiple so that the number of ranks divides the rows"
            )
        corpora = {
            name: TokenCorpus(
                config.data_dir, name, verify=config.verify_checksums and self.accelerator.is_main_process
            )
            for name in config.domains
        }
        return CurriculumLoader(
            corpora, config.mixture(), plan, config.seed, self._pad_token_id(), self.accelerator.process_index, ranks
        )

    def _open_heldout(self) -> dict[str, list[dict]]:
        config = self.config
        if not config.eval_steps:
            return {}
        rows = max(1, (config.micro_batch_tokens or config.batch_tokens) // config.sequence_length)
        return {
            name: heldout_batches(
                TokenCorpus(config.data_dir, name, "heldout"),
                config.sequence_length,
                rows,
                config.eval_tokens,
                self._pad_token_id(),
            )
            for name in config.domains
        }

    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad
