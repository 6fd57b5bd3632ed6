"""MuonClip for Motif-2: `build_muon_clip(model, lr=…)` for any loop, `MuonClipFactory` for TRL and transformers."""

import contextlib
import importlib
from collections.abc import Iterable, Iterator

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from trainer.optim.groups import group_parameters
from trainer.optim.muon_clip_reference import MuonClip
from trainer.optim.parallel_muon_clip import ParallelMuonClip

__all__ = ["MuonClip", "MuonClipFactory", "ParallelMuonClip", "build_muon_clip"]


def build_muon_clip(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    adamw_lr: float | None = None,
    learning_rates: dict[str, float] | None = None,
    weight_decays: dict[str, float] | None = None,
    adamw_patterns: str | Iterable[str] = (),
    qk_clip_threshold: float | None = 100.0,
    **options,
) -> ParallelMuonClip:
    """Make MuonClip for `model`: parameters grouped by name, QK-clip connected to its attention modules.

    Args:
        model: a Motif-2 model, possibly wrapped (PEFT, compile, DDP) or sharded (FSDP2, tensor parallelism).
        lr: learning rate of the matrices.
        weight_decay: decoupled decay of matrices, embeddings and head.
        adamw_lr: learning rate of all other groups, also of those added later; `lr` where None.
        learning_rates: learning rate by group name (see `groups.GROUP_NAMES`); wins over `lr` and `adamw_lr`.
        weight_decays: weight decay by group name; wins over `weight_decay`.
        adamw_patterns: regular expressions, or one, of matrices that AdamW shall take.
        qk_clip_threshold: largest attention logit left alone; None switches QK-clip off.
        options: further arguments of `ParallelMuonClip`, such as `momentum`, `chunk_size` or `qk_clip_rule`; not
            `attentions`, which are the model's.

    Returns:
        ParallelMuonClip: the optimizer. Unless QK-clip is off, the model's maximum logits are tracked from now on, in
            forwards with gradients, exactly above the threshold; below it a cheap bound stands for them
            (`track_max_logits(model)` afterwards makes all of them exact, at the price of one more product of queries
            and keys a layer).

    Raises:
        ValueError: names or settings that fit nothing in the model, or out of range; the model is left as it was. Or
            the model is sharded by FSDP 1.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is sharded by FSDP 1, whose flat parameters are no matrices: take FSDP2 (fully_shard; "
            "fsdp_version 2 in accelerate's files)"
        )
    if "attentions" in options:
        raise ValueError("attentions are found in the model: leave them out, or make ParallelMuonClip itself")
    groups = group_parameters(
        model.named_parameters(), lr, weight_decay, learning_rates, weight_decays, adamw_patterns
    )
    for group in groups:
        if (
            adamw_lr is not None
            and group["algorithm"] == "adamw"
            and group["group_name"] not in (learning_rates or {})
        ):
            group["lr"] = adamw_lr
    attentions = [] if qk_clip_threshold is None else _clippable_attentions(model)
    options |= {"lr": lr, "weight_decay": weight_decay, "adamw_lr": adamw_lr, "qk_clip_threshold": qk_clip_threshold}
    with _undone_if_refused(model):
        if attentions:
            _track_max_logits(model, attentions[0], qk_clip_threshold)
        return ParallelMuonClip(groups, attentions=attentions, **options)


class MuonClipFactory:
    """Factory for `optimizer_cls_and_kwargs=(MuonClipFactory, kwargs)` of TRL's and transformers' Trainer."""

    def __call__(self, model: nn.Module, **kwargs) -> ParallelMuonClip:
        """Return `build_muon_clip(model, **kwargs)`."""
        return build_muon_clip(model, **kwargs)


def _clippable_attentions(model: nn.Module) -> list[nn.Module]:
    """Attention modules whose query and key weights both train; others cannot be clipped and need no tracking."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "num_signal_heads_per_group")
        and all(getattr(getattr(module, name, None), "weight", None) is not None for name in ("q_proj", "k_proj"))
        and module.q_proj.weight.requires_grad
        and module.k_proj.weight.requires_grad
    ]


def _track_max_logits(model: nn.Module, attention: nn.Module, threshold: float) -> None:
    """Turn tracking on through the attention's own package, which for remote code is not `modeling_motif2`."""
    package = type(attention).__module__.rpartition(".")[0]
    importlib.import_module(f"{package}.diagnostics").track_max_logits(model, gate=threshold, only_with_grad=True)


@contextlib.contextmanager
def _undone_if_refused(model: nn.Module) -> Iterator[None]:
    """Put the tracking of maximum logits back if the block raises."""
    before = [(module, dict(vars(module))) for module in model.modules() if hasattr(module, "max_logits")]
    try:
        yield
    except Exception:
        for module, attributes in before:
            vars(module).update(attributes)
        raise
