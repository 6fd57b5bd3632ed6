"""The models, batches and runs that train_step.py times: ours by the trainer's step, peers by transformers' Trainer.

Legend: D head dimension.
"""

import contextlib
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    DiffLlamaConfig,
    LlamaConfig,
)

from kernels_hub import use_gda_attention, use_polynorm
from kernels_hub.gda import ATTENTIONS
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.data.curriculum import DomainShare, Mixture
from trainer.data.loader import CurriculumLoader
from trainer.execution import (
    bfloat16_residual,
    compile_layers,
    convert_to_fp8,
    recompute_layers,
)
from trainer.flops import count_parameters, training_flops
from trainer.optim import build_muon_clip
from trainer.schedules import BatchPlan
from trainer.step import TrainStep

# Without a GPU a step's seconds are the process's own on its CPU cores: other work on the machine does not count.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
MEAN_DOCUMENT_TOKENS = 1000  # assumption: of the packed rows


@dataclass(frozen=True)
class Shape:
    """Sizes that all models of a run share; GDA has `key_heads / 2` groups of 4 signal heads and a noise head."""

    hidden: int
    intermediate: int
    layers: int
    key_heads: int
    head_dim: int
    vocabulary: int
    length: int
    rows: int  # of a step, on each rank
    micro_rows: int

    def motif(self) -> Motif2Config:
        groups = self.key_heads // 2
        return Motif2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=5 * groups,
            num_key_value_heads=self.key_heads,
            num_noise_heads=groups,
            head_dim=self.head_dim,
            max_position_embeddings=self.length,
        )

    def peer(self, kind: str):
        """A Llama or DiffLlama of about as many parameters: its MLP is widened by what its attention lacks."""
        heads = self.hidden // self.head_dim
        attention = 2 * self.hidden * self.head_dim * (heads + self.key_heads)
        missing = count_parameters(self.motif())["matrices"] // self.layers - attention
        wide = round(missing / (3 * self.hidden) / 32) * 32
        config_class = {"Llama": LlamaConfig, "DiffLlama": DiffLlamaConfig}[kind]
        return config_class(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=wide,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.length,
            attn_implementation="sdpa",
        )


# The report's first batch, 16,384,000 tokens, on its 400 GPUs gives each 40,960 tokens a step.
LARGE = Shape(2048, 8192, 20, 8, 128, 32_000, 4096, 10, 2)
TINY = Shape(64, 128, 3, 4, 16, 512, 64, 4, 2)
CPU_10M = Shape(320, 1280, 6, 4, 40, 4096, 256, 8, 8)


@dataclass(frozen=True)
class Variant:
    """How our step runs."""

    name: str
    optimizer: str = "muon_clip"
    attention: str = "sdpa"
    fp8: str = "none"
    compiled: bool = False
    recompute: str = "none"
    residual: str = "float32"
    chunk_size: int | None = 2
    loss: str = "auto"
    packed: bool = False
    rows: int | None = None  # of a step, where not the shape's
    micro_rows: int | None = None


@dataclass
class Timing:
    """What a run measured: seconds of each step, of its parts, waiting for data; FLOPs and peak bytes of a step."""

    seconds: list[float]
    tokens: int
    flops: float
    parameters: int
    peak_bytes: int | None = None
    wait_seconds: float = 0.0
    parts: dict[str, float] | None = None


def motif_flops(config: Motif2Config, tokens: int, pairs: int) -> float:
    return training_flops(config, tokens, pairs)


def peer_flops(config, tokens: int, pairs: int) -> float:
    """Training FLOPs of a Llama (12 D a pair and head) or DiffLlama (18 D: its values are twice as wide)."""
    heads, dim = config.num_attention_heads, config.head_dim
    attention = 2 * config.hidden_size * dim * (heads + config.num_key_value_heads)
    matrices = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    pair = (18 if isinstance(config, DiffLlamaConfig) else 12) * heads * dim * config.num_hidden_layers
    return 6 * (matrices + config.vocab_size * config.hidden_size) * tokens + pair * pairs


class RandomCorpus:
    """Documents of random words: whole rows, or of many lengths.

    Args:
        vocabulary: number of words.
        length: of a row.
        packed: lengths are log-normal about MEAN_DOCUMENT_TOKENS instead.
    """

    num_documents = 20_000
    fingerprint = "random"

    def __init__(self, vocabulary: int, length: int, packed: bool):
        generator = np.random.default_rng(0)
        mean = min(MEAN_DOCUMENT_TOKENS, length / 4)
        many = generator.lognormal(np.log(mean) - 0.5, 1.0, self.num_documents).clip(2, 4 * length).astype(np.int64)
        self._lengths = many if packed else np.full(self.num_documents, length)
        self._words = generator.integers(0, vocabulary, 4 * length, dtype=np.int64)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._lengths[numbers]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.roll(self._words, document)[start:stop]


def make_loader(shape: Shape, packed: bool, rank: int, ranks: int) -> CurriculumLoader:
    """The trainer's own loader over random documents."""
    tokens = shape.rows * shape.length * ranks
    return CurriculumLoader(
        {"web": RandomCorpus(shape.vocabulary, shape.length, packed)},
        Mixture({"web": DomainShare(1.0, 1.0)}, 10**12),
        BatchPlan(tokens, {0: shape.length}, rows_multiple=ranks),
        0,
        0,
        rank,
        ranks,
    )


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate for this process, with FSDP2 where there are several on GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps there that the last one sharded
    cuda = torch.cuda.is_available()
    plugin = None
    if cuda and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Motif2DecoderLayer"],
            reshard_after_forward=True,
            state_dict_type="SHARDED_STATE_DICT",
        )
    return Accelerator(mixed_precision=precision if cuda else "no", cpu=not cuda, fsdp_plugin=plugin)


class OurRun:
    """A model and everything its steps need.

    Args:
        shape: sizes.
        variant: how it runs.
        backend: of torch.compile; by default none that makes machine code on a CPU.
    """

    def __init__(self, shape: Shape, variant: Variant, backend: str | None = None):
        self.shape = replace(shape, rows=variant.rows or shape.rows, micro_rows=variant.micro_rows or shape.micro_rows)
        self.accelerator = make_accelerator("bf16")
        torch.manual_seed(0)
        self.config = self.shape.motif()
        in_kernels = variant.attention in ATTENTIONS
        self.config._attn_implementation = "sdpa" if in_kernels else variant.attention
        with self.accelerator.device:
            model = Motif2ForCausalLM(self.config)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if in_kernels:
            use_gda_attention(model, attn_implementation=variant.attention)
        if variant.residual == "bfloat16":
            bfloat16_residual(model)
        if variant.fp8 != "none":
            convert_to_fp8(model, variant.fp8, emulate=not torch.cuda.is_available())
        if variant.recompute != "none":
            recompute_layers(model, variant.recompute)
        if variant.compiled:
            compile_layers(model, backend or ("inductor" if torch.cuda.is_available() else "aot_eager"))
        self.polynorm = use_polynorm(model, "auto")
        options: dict[str, Any] = {"chunk_size": variant.chunk_size}
        if variant.optimizer == "adamw":
            options |= {"adamw_patterns": (".*",), "weight_decays": {"other": 0.1}, "qk_clip_threshold": None}
        optimizer = build_muon_clip(model, lr=4e-4, **options)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        micro_tokens = self.shape.micro_rows * self.shape.length
        machine_code = variant.compiled and (torch.cuda.is_available() or backend == "inductor")
        self.step = TrainStep(
            self.accelerator, self.model, self.optimizer, ["web"], 1.0, micro_tokens, variant.loss, machine_code
        )
        for attention in self.step.attentions:  # as in nine of ten of the trainer's steps: exact above the threshold
            attention.max_logits_gate = 100.0
        ranks = self.accelerator.num_processes
        self.loader = make_loader(self.shape, variant.packed, self.accelerator.process_index, ranks)

    def first_step(self) -> tuple[float, float]:
        """Loss and gradient norm of one step that changes no weight."""
        outcome = self.step.run(self.loader.next_batch(), 0.0)
        return outcome.loss, outcome.grad_norm

    def time(self, warm_ups: int, repeats: int) -> Timing:
        """Run steps as the trainer's loop does, from the next batch to the number of clipped heads."""
        for _ in range(warm_ups):
            self.step.run(self.loader.next_batch(), 0.01)
        synchronize(reset_peak=True)
        seconds, waits, flops = [], [], []
        with PartTimer(self) as parts:
            for _ in range(repeats):
                started, called = clock(), time.perf_counter()
                batch = self.loader.next_batch()
                waits.append(time.perf_counter() - called)
                outcome = self.step.run(batch, 0.01)
                synchronize()
                seconds.append(clock() - started)
                flops.append(motif_flops(self.config, batch.nominal_tokens, batch.attention_pairs))
                if outcome.skipped:
                    raise RuntimeError(f"a step had loss {outcome.loss} and gradient norm {outcome.grad_norm}")
        ranks = self.accelerator.num_processes
        return Timing(
            seconds,
            batch.nominal_tokens,
            sum(flops) / len(flops) / ranks,
            self.parameters,
            peak_bytes(),
            sum(waits) / repeats,
            parts.shares(sum(seconds)),
        )

    def close(self) -> None:
        self.loader.close()


class PartTimer:
    """Times forward, backward and optimizer of a run's steps, by device events where there is a device."""

    def __init__(self, run: OurRun):
        self.run = run
        self.spans: list[tuple[str, Any, Any]] = []
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "PartTimer":
        targets = {
            "forward": (self.run.step, "token_losses"),
            "backward": (self.run.accelerator, "backward"),
            "optimizer": (self.run.optimizer.optimizer, "step"),
        }
        for part, (owner, name) in targets.items():
            original, own = getattr(owner, name), name in vars(owner)
            setattr(owner, name, self._timed(part, original))
            self.stack.callback(setattr if own else delattr, owner, name, *([original] if own else []))
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def _timed(self, part: str, function):
        def timed(*args, **kwargs):
            start = mark()
            result = function(*args, **kwargs)
            self.spans.append((part, start, mark()))
            return result

        return timed

    def shares(self, total_seconds: float) -> dict[str, float]:
        """Share of each part in all the steps; the rest is clipping, measuring, data and waiting."""
        synchronize()
        sums: dict[str, float] = {}
        for part, start, end in self.spans:
            sums[part] = sums.get(part, 0.0) + between(start, end)
        return {part: seconds / total_seconds for part, seconds in sums.items()}


def linear_layers(shape: Shape, fp8: str, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """All products of one decoder layer, compiled, and rows for them: the part of a step that is bound by products."""
    config = replace(shape, layers=1).motif()
    torch.manual_seed(0)
    with device:
        model = Motif2ForCausalLM(config)
        if fp8 != "none":
            convert_to_fp8(model, fp8, 0, emulate=device.type == "cpu")
        torch.manual_seed(1)
        rows = torch.randn(shape.micro_rows * shape.length, shape.hidden, device=device)
    layer = model.model.layers[0]
    layer.forward = _products_of(layer)
    if device.type == "cuda":
        layer.forward = torch.compile(layer.forward)
    return layer, (rows.bfloat16() if device.type == "cuda" else rows).requires_grad_()


def _products_of(layer: nn.Module):
    attention, mlp = layer.self_attn, layer.mlp

    def products(rows: torch.Tensor) -> torch.Tensor:
        query, key, value = attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows)
        width = attention.o_proj.in_features
        mixed = torch.cat((query, key, value), -1)[:, :width]
        mixed = attention.o_proj(nn.functional.pad(mixed, (0, width - mixed.shape[1])))
        return mlp.down_proj(mlp.gate_proj(mixed) + mlp.up_proj(mixed))

    return products


def synchronize(reset_peak: bool = False) -> None:
    """Wait for the device; start its peak of memory anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()


def mark():
    """A point in time: a device event, or the clock."""
    if not torch.cuda.is_available():
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Seconds between two marks."""
    return 1e-3 * start.elapsed_time(end) if torch.cuda.is_available() else end - start


def peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def describe(variant: Variant) -> dict:
    """A variant's columns in the table."""
    return {name: value for name, value in asdict(variant).items() if name not in ("name", "rows", "micro_rows")}
