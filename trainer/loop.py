"""The pre-training run: data, model and optimizer are put together, then step after step until the last token.

The parts come from `trainer/assemble.py`; what a step does is in `trainer/step.py`.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed

from trainer.assemble import (
    build_optimizer,
    make_accelerator,
    open_heldout,
    open_loader,
    prepare,
    prepare_shards,
    put_kernels,
    split_layers,
)
from trainer.averaging import average_with_checkpoints
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import complete_checkpoints
from trainer.config import PretrainConfig
from trainer.data.loader import Batch
from trainer.errors import LossSpikeError, LostRankError, RunStoppedError, StoppedBySignalError, is_lost_rank
from trainer.failure_signs import CheckpointWarning, FailureSigns, LossSpikeWarning
from trainer.measurements import Measurements
from trainer.metrics import Metrics
from trainer.model import build_model, load_tokenizer
from trainer.run_folder import CHECKPOINTS, METRICS, MODEL, TRACKED, open_run_folder, save_whole
from trainer.spikes import SpikeDetector
from trainer.step import NonFiniteLossError, StepOutcome, TrainStep, whole

ANOTHER_RUN = (
    "or begin another output_dir with a lower learning_rate or more warmup_tokens (python -m trainer.export makes a "
    "checkpoint a model_name_or_path to begin with)"
)


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run leaves.

    Args:
        output_dir: of the run.
        model_dir: final model and tokenizer, for `from_pretrained`.
        metrics_path: `metrics.jsonl`.
        steps, tokens: length of the run.
        first_eval, last_eval: held-out loss by domain before and after training; empty when eval_steps is 0.
        padding_share: of all tokens, those that filled the ends of rows.
        lost_share: of all tokens, those that nothing was learnt from: padding, and each packed piece's first token.
    """

    output_dir: Path
    model_dir: Path
    metrics_path: Path
    steps: int
    tokens: int
    first_eval: dict[str, float]
    last_eval: dict[str, float]
    padding_share: float
    lost_share: float


@dataclass
class Progress:
    """Where a run stands; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    lost_tokens: int = 0
    skipped_steps: int = 0
    rewinds: list[dict] = field(default_factory=list)
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)


def run_pretraining(config: PretrainConfig, stop_asked: Callable[[], bool] = lambda: False) -> PretrainResult:
    """Pre-train a Motif-2 model, from its last checkpoint if the run was interrupted.

    Args:
        config: all settings; `config.output_dir` gets everything the run writes.
        stop_asked: asked before every step whether this process is to end.

    Raises:
        ValueError: the output folder, corpus, tokenizer or checkpoint does not fit the settings.
        NonFiniteLossError: more than `max_skipped_steps` steps had a non-finite loss or gradient.
        LossSpikeError: the loss spiked more than `max_rewinds` times.
        CheckpointError: a checkpoint could not be written.
        LostRankError: another rank died or hangs.
        StoppedBySignalError: `stop_asked` said so.
        RunStoppedError: the disk refused something else.
    """
    try:
        return _Run(config, make_accelerator(config), stop_asked).train()
    except RuntimeError as error:
        if isinstance(error, RunStoppedError) or not is_lost_rank(error):
            raise
        rank = os.environ.get("RANK", 0)
        raise LostRankError(f"rank {rank} lost another rank before the first step, see that rank's message") from error
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


class _Run:
    def __init__(self, config: PretrainConfig, accelerator: Accelerator, stop_asked: Callable[[], bool]):
        self.config, self.accelerator, self.stop_asked = config, accelerator, stop_asked
        self.folder = open_run_folder(config, accelerator)
        self.tokenizer = load_tokenizer(config.tokenizer)
        prepare_shards(config, self.tokenizer, accelerator)
        self.loader = open_loader(config, self.tokenizer, accelerator)
        self.heldout = open_heldout(
            config,
            self.tokenizer,
            accelerator.num_processes,
            config.verify_checksums and accelerator.is_main_process,
        )
        self.schedule = config.learning_rate_schedule()
        set_seed(config.seed)
        model = build_model(config, self.tokenizer)
        self.measurements = Measurements(config, accelerator, model.config)
        model.to(accelerator.device)
        put_kernels(config, accelerator, model)
        model = split_layers(config, accelerator, model)
        self.model, self.optimizer = prepare(config, accelerator, model, build_optimizer(config, model))
        self.step = TrainStep(
            accelerator,
            self.model,
            self.optimizer,
            list(config.domains),
            config.max_grad_norm,
            config.micro_batch_tokens,
            config.loss,
            config.compile_layers,
            config.tensor_parallel,
        )
        self.checkpoints = Checkpoints(
            self.folder / CHECKPOINTS,
            accelerator,
            config.keep_last,
            config.keep_every_steps,
            config.async_checkpoints,
            config.timeout_seconds,
        )
        self.checkpoint_due = False
        self.spikes = SpikeDetector(
            config.spike_window_steps, config.spike_deviations, config.spike_min_rise, config.spike_patience_steps
        )
        self.signs = FailureSigns(config)
        self.progress = Progress()

    def train(self) -> PretrainResult:
        """Run to the last token and export the model."""
        accelerator, config = self.accelerator, self.config
        if config.trackers:
            accelerator.init_trackers(TRACKED)
        metrics_path = self.folder / METRICS
        self.metrics = Metrics(metrics_path, accelerator, config.total_tokens, config.log_steps, config.progress)
        try:
            self._start()
            while self.progress.tokens < config.total_tokens:
                if self.stop_asked():
                    self.checkpoints.wait()
                    where = self._where()
                    raise StoppedBySignalError(f"a signal stopped this process {where}: start the same command again")
                self._train_step()
            self.checkpoints.wait()
            model_dir = self._finish()
        except (RuntimeError, OSError) as error:
            explained = self._explain(error)
            if explained is None:
                raise
            raise explained from error
        finally:
            self.loader.close()
            self.checkpoints.close()
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
            progress.padding_tokens / progress.tokens,
            progress.lost_tokens / progress.tokens,
        )

    def _start(self) -> None:
        """Go on from the last checkpoint, or evaluate the new model."""
        path = self._last_checkpoint()
        if path is None:
            self.metrics.resume(-1, 0)
            self._evaluate()
            return
        self._restore(path)
        self.metrics.say(f"going on from {path}: step {self.progress.step}, {self.progress.tokens:,} tokens seen")

    def _train_step(self) -> None:
        config, progress = self.config, self.progress
        started = time.perf_counter()
        batch = self.loader.next_batch()
        waited = time.perf_counter() - started
        tokens_before = progress.tokens
        self._count_tokens(batch)
        factor = self.schedule.factor(progress.tokens)
        logits = self.measurements.of_logits(self.model, progress.step + 1)
        with self.measurements.norms(self.model, progress.step + 1):
            outcome = self.step.run(batch, factor)
        progress.step += 1
        limit = self.spikes.limit
        spiked = not outcome.skipped and self.spikes.observe(outcome.loss)
        times = self.measurements.of_time(batch, time.perf_counter() - started, waited)
        self._report(batch, outcome, factor, logits | times)
        if outcome.skipped:
            self._count_skipped(outcome)
        if spiked and self._rewind(batch, outcome.loss, limit):
            return
        if config.average_every_tokens:
            self._average(tokens_before)
        finished = progress.tokens >= config.total_tokens
        if config.eval_steps and (finished or progress.step % config.eval_steps == 0):
            self._evaluate()
        if config.checkpoint_steps:
            self._checkpoint(batch, finished, outcome.skipped)

    def _count_tokens(self, batch: Batch) -> None:
        progress = self.progress
        progress.tokens += batch.nominal_tokens
        progress.padding_tokens += batch.nominal_tokens - sum(batch.tokens_by_domain.values())
        progress.lost_tokens += batch.nominal_tokens - batch.predicted_tokens

    def _report(self, batch: Batch, outcome: StepOutcome, factor: float, measured: dict) -> None:
        progress = self.progress
        entry = {"step": progress.step, "tokens": progress.tokens, **asdict(outcome)}
        entry["learning_rate"] = self.config.learning_rate * factor
        entry["skipped_steps"] = progress.skipped_steps + outcome.skipped
        entry |= measured | self.measurements.of_batch(batch, self.loader)
        entry |= self.measurements.of_memory() | self.measurements.last_norms(outcome.lambdas)
        rewinds = [rewind for rewind in progress.rewinds if rewind["to_step"] == progress.step - 1]
        if rewinds:
            entry["rewinds"] = rewinds
        for warning in self.signs.read(entry):
            self.metrics.warn(warning)
        failure = self.checkpoints.failure()
        if failure is not None:
            self.metrics.warn(CheckpointWarning(f"step {progress.step}: {failure}"))
        self.metrics.step(entry)

    def _count_skipped(self, outcome: StepOutcome) -> None:
        self.progress.skipped_steps += 1
        if self.progress.skipped_steps > self.config.max_skipped_steps:
            self.checkpoints.wait()
            raise NonFiniteLossError(
                f"step {self.progress.step} has loss {outcome.loss} and gradient norm {outcome.grad_norm}, and "
                f"max_skipped_steps is {self.config.max_skipped_steps}; the last checkpoint is "
                f"{self.checkpoints.latest()}: raise max_skipped_steps and start the same command again to leave such "
                f"steps out, {ANOTHER_RUN}"
            )

    def _rewind(self, batch: Batch, loss: float, limit: float) -> bool:
        """After a spike: weights, optimizer and schedules of the last checkpoint, and the data after `batch`.

        All ranks decide alike, because the loss is the same number on all. Nothing of it needs saving: a run that is
        killed before its next checkpoint meets the same spike again, and rewinds again.

        Returns:
            bool: whether there was a checkpoint to go back to.
        """
        self.checkpoints.wait()
        step, path = self.progress.step, self._last_checkpoint()
        self.metrics.warn(LossSpikeWarning(f"step {step}: the loss spiked to {loss:.4f}, above {limit:.4f}"))
        if path is None:
            self.metrics.say("there is no checkpoint to go back to; training goes on")
            self.spikes.high_steps = 0
            return False
        rewinds = self.progress.rewinds
        if len(rewinds) >= self.config.max_rewinds:
            raise LossSpikeError(
                f"the loss spiked to {loss:.4f} at step {step}, above {limit:.4f}, after max_rewinds "
                f"{self.config.max_rewinds} rewinds; the last checkpoint is {path}: look at the data, raise "
                f"max_rewinds and start the same command again, {ANOTHER_RUN}"
            )
        self._restore(path, streams=batch.state["streams"])
        rewind = {"from_step": step, "to_step": self.progress.step, "loss": loss, "limit": limit}
        self.progress.rewinds = [*rewinds, rewind]
        self.checkpoint_due = False
        self.metrics.say(
            f"back to {path}; the {step - self.progress.step} batches since are skipped "
            f"(rewind {len(self.progress.rewinds)} of {self.config.max_rewinds})"
        )
        return True

    def _average(self, tokens_before: int) -> None:
        """Every `average_every_tokens`, go on from the mean of the last checkpoints and the current weights."""
        every, others = self.config.average_every_tokens, self.config.average_checkpoints - 1
        if self.progress.tokens // every == tokens_before // every:
            return
        self.checkpoints.wait()
        paths = broadcast_object_list([complete_checkpoints(self.folder / CHECKPOINTS)[-others:]])[0]
        if len(paths) < others:
            self.metrics.say(f"no averaging at step {self.progress.step}: {len(paths)} of {others} checkpoints exist")
            return
        average_with_checkpoints(self.model, paths)
        names = ", ".join(path.name for path in paths)
        self.metrics.say(f"step {self.progress.step}: going on from the mean of the weights and {names}")

    def _evaluate(self) -> None:
        if not self.heldout:
            return
        losses = {name: self.step.evaluate(batches) for name, batches in self.heldout.items()}
        self.progress.first_eval = self.progress.first_eval or losses
        self.progress.last_eval = losses
        self.metrics.evaluation({"step": self.progress.step, "tokens": self.progress.tokens, "eval": losses})

    def _checkpoint(self, batch: Batch, finished: bool, skipped: bool) -> None:
        """Save when it is time, but not while the loss is high or not finite: that may be a spike to rewind from, and
        weights that give nothing finite must not push good ones out."""
        self.checkpoint_due |= finished or self.progress.step % self.config.checkpoint_steps == 0
        if self.checkpoint_due and (finished or not (self.spikes.high_steps or skipped)):
            state = {**vars(self.progress), "loader": batch.state, "spikes": self.spikes.state_dict()}
            self.checkpoints.save(self.model, self.optimizer, state)
            self.checkpoint_due = False

    def _last_checkpoint(self) -> Path | None:
        """The newest checkpoint that the main process sees."""
        return broadcast_object_list([self.checkpoints.latest()])[0]

    def _restore(self, path: Path, streams: dict | None = None) -> None:
        """Continue from a checkpoint; `streams` are positions in the data to take instead of its own."""
        state = self.checkpoints.load(path, self.model, self.optimizer)
        loader_state = state.pop("loader")
        self.loader.load_state_dict(loader_state | ({"streams": streams} if streams else {}))
        self.spikes.load_state_dict(state.pop("spikes"))
        self.progress = Progress(**state)
        self.metrics.resume(self.progress.step, self.progress.tokens)

    def _finish(self) -> Path:
        state_dict = {name: whole(value) for name, value in self.accelerator.get_state_dict(self.model).items()}
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            save_whole(model, state_dict, self.tokenizer, self.folder / MODEL)
        self.accelerator.wait_for_everyone()
        return self.folder / MODEL

    def _where(self) -> str:
        return f"at step {self.progress.step}; the last complete checkpoint is {self.checkpoints.latest()}"

    def _explain(self, error: Exception) -> RunStoppedError | None:
        """What a person needs to know when the machine stops the run; None for other errors."""
        where = self._where()
        if is_lost_rank(error):
            rank = self.accelerator.process_index
            return LostRankError(f"rank {rank} lost another rank {where}: start the same command again ({error})")
        if isinstance(error, OSError):
            return RunStoppedError(f"{error} {where}: mend it and start the same command again")
        return None
