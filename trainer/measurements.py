"""What a run measures beside its loss: data, time, memory, and the outputs of the signal and noise maps.

Legend: N layers, H query heads, G groups.
"""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from modeling_motif2 import Motif2Config
from modeling_motif2.diagnostics import attention_modules, track_output_norms
from trainer.config import PretrainConfig
from trainer.data.loader import Batch, CurriculumLoader
from trainer.flops import training_flops


class Measurements:
    """Makes the parts of a line of `metrics.jsonl`.

    Args:
        config: of the run.
        accelerator: of the run.
        model_config: of its model.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, model_config: Motif2Config):
        self.config, self.accelerator, self.model_config = config, accelerator, model_config
        self._norms: torch.Tensor | None = None  # (N, H)

    def of_batch(self, batch: Batch, loader: CurriculumLoader) -> dict:
        """Shares of the domains, how often each was read through, and the share that nothing is learnt from."""
        real_tokens = sum(batch.tokens_by_domain.values())
        return {
            "mixture": batch.weights,
            "realised": {name: tokens / real_tokens for name, tokens in batch.tokens_by_domain.items()},
            "epochs": {
                name: state["next_document"] / loader.streams[name].corpus.num_documents
                for name, state in batch.state["streams"].items()
            },
            "padding_share": 1 - real_tokens / batch.nominal_tokens,
            "lost_share": 1 - batch.predicted_tokens / batch.nominal_tokens,
            "sequence_length": batch.input_ids.shape[1],
        }

    def of_time(self, batch: Batch, seconds: float, waited: float) -> dict:
        """Speed, the wait for data, and MFU where `peak_tflops` is set."""
        entry = {
            "seconds": seconds,
            "data_wait_seconds": waited,
            "data_wait_share": waited / seconds,
            "tokens_per_second": batch.nominal_tokens / seconds,
        }
        if self.config.peak_tflops:
            flops = training_flops(self.model_config, batch.nominal_tokens, batch.attention_pairs)
            entry["mfu"] = flops / seconds / (self.config.peak_tflops * 1e12 * self.accelerator.num_processes)
        return entry

    def of_memory(self) -> dict:
        """This rank's accelerator memory: the most that tensors took since the last call; nothing on CPU."""
        if not torch.cuda.is_available():
            return {}
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return {"peak_memory_bytes": peak}

    def of_logits(self, model: nn.Module, step: int) -> dict:
        """Set up how this step takes its maximum logits, and say which; before the forward pass.

        They are exact every `exact_logit_steps` steps, from the first. Else a cheap bound stands for those that
        QK-clip leaves alone, and only logits above its threshold are exact.
        """
        every = self.config.exact_logit_steps
        exact = self.config.qk_clip_threshold is None or (every > 0 and (step - 1) % every == 0)
        for attention in attention_modules(model):
            attention.max_logits_gate = None if exact else self.config.qk_clip_threshold
        return {"max_logits_exact": exact}

    @contextlib.contextmanager
    def norms(self, model: nn.Module, step: int) -> Iterator[None]:
        """Measure the maps' outputs inside the block, if it is this step's turn; otherwise nothing is computed."""
        self._norms = None
        if not self.config.norm_steps or step % self.config.norm_steps:
            yield
            return
        track_output_norms(model)
        yield
        sums = torch.stack([attention.output_norms for attention in attention_modules(model)])  # (N, H + 1)
        track_output_norms(model, enabled=False)
        sums = self.accelerator.reduce(sums, "sum")
        tokens = sums[:, -1:] / self.config.tensor_parallel  # each of those ranks counted them, and has its own heads
        self._norms = (sums[:, :-1] / tokens).cpu()

    def last_norms(self, lambdas: list[float]) -> dict:
        """Mean length by layer of the signal outputs, of the noise outputs, and of lambda times noise over signal.

        Args:
            lambdas: of each layer.
        """
        if self._norms is None:
            return {}
        by_group = self._norms.unflatten(1, (self.model_config.num_groups, -1))  # (N, G, r + 1)
        signal, noise = by_group[..., :-1].mean((1, 2)), by_group[..., -1].mean(1)  # (N,)
        shares = torch.tensor(lambdas).abs() * noise / signal
        return {"signal_norms": signal.tolist(), "noise_norms": noise.tolist(), "noise_shares": shares.tolist()}
