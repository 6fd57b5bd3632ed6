"""What attention does, by layer: lambda, the norms of the signal and noise maps' outputs, and the largest logits.

Nothing is computed or kept until `track_max_logits` or `record_attention` turns it on. Under tensor parallelism a rank
records the groups it holds; the other groups' maxima stay -inf there, and their norms 0.

Shapes: B batch, T query tokens, S key tokens, G groups, r signal heads a group, H = G * (r + 1) query heads,
D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .max_logits import largest_logits


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's attention did since recording began.

    Attributes:
        layer: index from 0.
        lambda_value: weight of the noise map.
        signal_norms: (G * r,) mean length of each signal map's output, or None when not recorded.
        noise_norms: (G,) mean length of each noise map's output, before lambda, or None when not recorded.
        max_logits: (H,) largest scaled logit of each query head in q_proj's order, or None when not tracked; behind a
            gate only what is above it is exact.
    """

    layer: int
    lambda_value: float
    signal_norms: torch.Tensor | None
    noise_norms: torch.Tensor | None
    max_logits: torch.Tensor | None

    @property
    def noise_share(self) -> float | None:
        """Length of lambda times the noise outputs over that of the signal outputs: how far noise has taken over."""
        if self.signal_norms is None:
            return None
        return abs(self.lambda_value) * float(self.noise_norms.mean() / self.signal_norms.mean())


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the model's `Motif2Attention` modules in the order of their layers.

    Raises:
        ValueError: if there is none.
    """
    found = [module for module in model.modules() if hasattr(module, "lambda_value") and hasattr(module, "max_logits")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Motif2Attention: pass a Motif-2 model or one that wraps it.")
    return sorted(found, key=lambda module: module.layer_idx)


def track_max_logits(
    model: nn.Module, enabled: bool = True, gate: float | None = None, only_with_grad: bool | None = None
) -> None:
    """Makes every attention keep `max_logits`, the running maximum of its scaled logits by head; or stops it.

    The tensor is (H,), float32, in q_proj's head order, starts at -inf, covers visible positions only and lives on the
    module's device. It is taken in the dtype that attention sees, without gradient or waiting for the device.

    Args:
        model: a Motif-2 model, or one that wraps it.
        enabled: False forgets what was kept.
        gate: only maxima above it need be exact; below it a cheap bound, from the exact maximum up to the gate, may
            stand for them. QK-clip asks no more of logits under its threshold. None: exact always.
        only_with_grad: leave forwards under `torch.no_grad` out: evaluation, generation and rollouts between two steps
            of an optimizer made no gradient, and QK-clip must not act on them. None: as it was, at first False.
    """
    for attention in attention_modules(model):
        attention.max_logits_gate = gate
        if only_with_grad is not None:
            attention.max_logits_only_with_grad = only_with_grad
        if not enabled:
            attention.max_logits = None
        elif attention.max_logits is None:
            attention.max_logits = _new_state(attention, -torch.inf, extra=0)


def keeps_max_logits(attention: nn.Module) -> bool:
    """Whether this forward of an attention counts for its maximum logits."""
    return attention.max_logits is not None and (torch.is_grad_enabled() or not attention.max_logits_only_with_grad)


def track_output_norms(model: nn.Module, enabled: bool = True) -> None:
    """Makes every attention sum the lengths of its maps' outputs by head, and count the tokens; or stops it.

    `output_norms` is (H + 1,), float32: the sums in q_proj's head order, then the number of tokens.
    """
    for attention in attention_modules(model):
        if not enabled:
            attention.output_norms = None
        elif attention.output_norms is None:
            attention.output_norms = _new_state(attention, 0.0, extra=1)


def _new_state(attention: nn.Module, value: float, extra: int) -> torch.Tensor:
    heads = attention.num_groups * (attention.num_signal_heads_per_group + 1)
    parameter = attention.lambda_q1
    device = (
        torch.device("cpu") if parameter.is_meta else parameter.device
    )  # an offloaded layer's: the forward moves it
    with torch.inference_mode(False):
        return torch.full((heads + extra,), value, dtype=torch.float32, device=device)


def _moved(state: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a state where the forward now is, fit for training even if that forward is inference."""
    with torch.inference_mode(False):
        return state.to(device)


def _lambda_of(attention: nn.Module) -> float:
    if not attention.lambda_q1.is_meta:
        return float(attention.lambda_value())
    from accelerate.utils import align_module_device  # what has put the layer off

    with align_module_device(attention):
        return float(attention.lambda_value())


def reset_max_logits(model: nn.Module) -> None:
    """Sets every tracked maximum back to -inf; where nothing is tracked, `max_logits` stays None."""
    for attention in attention_modules(model):
        if attention.max_logits is not None:
            attention.max_logits.fill_(-torch.inf)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[LayerStatistics]]:
    """Records every forward inside the block, with and without gradients.

    Yields:
        A list that holds one `LayerStatistics` a layer once the block has ended. A tracking of maximum logits that was
        already on keeps its own values, and misses what happens inside.
    """
    modules = attention_modules(model)
    names = ("max_logits", "output_norms", "max_logits_gate", "max_logits_only_with_grad")
    before = [{name: getattr(attention, name) for name in names} for attention in modules]
    for attention in modules:
        attention.max_logits = attention.output_norms = None
    track_max_logits(model, only_with_grad=False)
    track_output_norms(model)
    statistics: list[LayerStatistics] = []
    try:
        yield statistics
    finally:
        statistics.extend(_layer_statistics(attention) for attention in modules)
        for attention, state in zip(modules, before, strict=True):
            for name, value in state.items():
                setattr(attention, name, value)


@torch.no_grad()
def attention_statistics(model: nn.Module, **inputs) -> list[LayerStatistics]:
    """Returns one `LayerStatistics` a layer.

    Args:
        model: a Motif-2 model, or one that wraps it.
        **inputs: for one forward of the model to record. Without them, what has been tracked so far is returned.
    """
    if not inputs:
        return [_layer_statistics(attention) for attention in attention_modules(model)]
    with record_attention(model) as statistics:
        model(**inputs)
    return statistics


@torch.no_grad()
def _layer_statistics(attention: nn.Module) -> LayerStatistics:
    signal_norms = noise_norms = None
    if attention.output_norms is not None:
        sums, tokens = attention.output_norms[:-1], attention.output_norms[-1]
        by_group = (sums / tokens).view(attention.num_groups, -1)  # (G, r + 1)
        signal_norms, noise_norms = by_group[:, :-1].flatten().cpu(), by_group[:, -1].cpu()
    return LayerStatistics(
        layer=attention.layer_idx,
        lambda_value=_lambda_of(attention),
        signal_norms=signal_norms,
        noise_norms=noise_norms,
        max_logits=None if attention.max_logits is None else attention.max_logits.cpu().clone(),
    )


@torch.no_grad()
def update_max_logits(
    attention: nn.Module,
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor | None,
) -> None:
    """Raises `attention.max_logits` to this forward's maxima; called by the attention itself.

    Args:
        attention: the module whose `max_logits` is tracked.
        signal_query: (B, G * r, T, D), rotated.
        noise_query: (B, G, T, D), rotated.
        key: (B, G, 2 or more, S, D), rotated; a group's first key is the signal's and its last the noise's.
        visible: (B or 1, 1, T, S) boolean, or None for a plain causal mask.
    """
    gate = -torch.inf if attention.max_logits_gate is None else attention.max_logits_gate
    signal = largest_logits(signal_query, key[:, :, 0], visible, attention.scaling, gate)  # (G, r)
    noise = largest_logits(noise_query, key[:, :, -1], visible, attention.scaling, gate)  # (G, 1)
    raise_max_logits(attention, torch.cat((signal, noise), dim=1))  # (G, r + 1)


@torch.no_grad()
def raise_max_logits(attention: nn.Module, largest: torch.Tensor) -> None:
    """Raises `attention.max_logits` to a forward's maxima (G, r + 1); called by the attention itself."""
    if attention.max_logits.device != largest.device:  # the model was moved since
        attention.max_logits = _moved(attention.max_logits, largest.device)
    own = _own_groups(attention, attention.max_logits, len(largest))
    own.copy_(torch.maximum(own, largest))


def _own_groups(attention: nn.Module, state: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns a view (G, r + 1) of a state (H,), of the groups that this rank holds."""
    by_group = state.view(attention.num_groups, -1)
    if groups == attention.num_groups:
        return by_group
    first = attention.q_proj.weight.device_mesh.get_local_rank() * groups
    return by_group[first : first + groups]


@torch.no_grad()
def update_output_norms(
    attention: nn.Module, signal: torch.Tensor, noise: torch.Tensor, visible: torch.Tensor | None
) -> None:
    """Adds the lengths of this forward's outputs to `attention.output_norms`; called by the attention itself.

    Args:
        attention: the module whose `output_norms` is tracked.
        signal: (B, T, G, r, 2D) outputs of the signal maps.
        noise: (B, T, G, 1, 2D) outputs of the noise maps, before lambda.
        visible: (B or 1, 1, T, S) boolean; a token that sees nothing is padding and is not counted. None counts all.
    """
    lengths = torch.cat((signal, noise), dim=3).float().norm(dim=-1).flatten(2)  # (B, T, H)
    counted = lengths.new_ones(lengths.shape[:2])
    if visible is not None:
        counted = visible.any(-1)[:, 0].expand(lengths.shape[:2]).to(lengths.dtype)  # (B, T)
    sums = (lengths * counted[..., None]).sum((0, 1)).view(signal.shape[2], -1)  # (G, r + 1)
    if attention.output_norms.device != sums.device:
        attention.output_norms = _moved(attention.output_norms, sums.device)
    _own_groups(attention, attention.output_norms[:-1], len(sums)).add_(sums)
    attention.output_norms[-1:].add_(counted.sum())
