"""Ways to compute a layer's attention: transformers' backends, SDPA held to one of its kernels, and our own kernel.

Shapes: B batch, T query tokens, S key tokens, G groups, r signal heads a group, D head dimension.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from .diagnostics import keeps_max_logits
from .layers import Motif2RMSNorm, lambda_init
from .visible_intervals import block_mask, boolean_mask, causal_block_mask, is_intervals, lengths_of_documents

FLEX_SIZES = 64  # sizes that FlexAttention is compiled for before it runs uncompiled (assumption)


@dataclass(frozen=True)
class Way:
    """One way to compute a layer's attention.

    Args:
        name: in reports.
        backend: name of transformers' attention function; empty for the kernel, which does both maps and the norm.
        wide: whether the value goes in one piece of 2D.
        sdpa: kernel that SDPA must take.
        forward: of the kernel, its "own" or FlashAttention-4's ("flash").
        backward: the same.
    """

    name: str
    backend: str
    wide: bool = False
    sdpa: SDPBackend | None = None
    forward: str = "own"
    backward: str = "own"

    def context(self) -> contextlib.AbstractContextManager:
        """Returns what holds SDPA to its kernel, and keeps FlexAttention compiled for many sizes."""
        if self.backend == "flex_attention":
            return torch._dynamo.config.patch(recompile_limit=FLEX_SIZES)
        return contextlib.nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa)

    def stream(self, module: nn.Module) -> nn.Module:
        """Returns the stream to hand to the backend: flash attention reads its own name off the configuration."""
        if not self.backend.startswith("flash"):
            return module
        module = copy.copy(module)
        module.config = copy.copy(module.config)
        module.config._attn_implementation = self.backend
        return module

    def mask(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> Any:
        """Returns the mask in the backend's form, for a query (B, heads, T, D) and a key (B, G, 2, S, D)."""
        tokens, keys = query.shape[2], key.shape[3]
        if self.backend == "flex_attention" and tokens > 1 and (mask is None or is_intervals(mask)):
            return causal_block_mask(tokens, keys, query.device) if mask is None else block_mask(mask, keys)
        if is_intervals(mask):
            return None if self.backend.startswith("flash") else boolean_mask(mask, keys)
        return mask

    def lengths(self, mask: torch.Tensor | None) -> dict[str, Any]:
        """Returns what tells a flash attention the documents and padding of intervals; nothing for other backends."""
        return lengths_of_documents(mask) if self.backend.startswith("flash") and is_intervals(mask) else {}


SDPA = Way("sdpa", "sdpa")
KERNEL = Way("kernel", "")
FLASH_BACKWARD = Way("kernel, flash backward", "", backward="flash")
FLASH = Way("kernel, flash", "", forward="flash", backward="flash")
WAYS = {
    way.name: way
    for way in (
        SDPA,
        Way("sdpa flash", "sdpa", sdpa=SDPBackend.FLASH_ATTENTION),
        Way("sdpa cudnn", "sdpa", sdpa=SDPBackend.CUDNN_ATTENTION),
        Way("sdpa cudnn wide", "sdpa", wide=True, sdpa=SDPBackend.CUDNN_ATTENTION),
        Way("flex_attention", "flex_attention"),
        Way("flash_attention_2", "flash_attention_2"),
        Way("flash_attention_3", "flash_attention_3"),
        Way("flash_attention_4", "flash_attention_4"),
        KERNEL,
        FLASH_BACKWARD,
        FLASH,
    )
}


def is_training(query: torch.Tensor, key: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)


def is_recorded(query: torch.Tensor) -> bool:
    """Returns whether a graph is being traced or captured, so that nothing can be asked of the device."""
    return torch.compiler.is_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing())


def possible_ways(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kind: str) -> list[Way]:
    """Returns the ways that could do this call, SDPA first; arguments as in `choose`."""
    ways = [SDPA]
    if query.device.type == "cuda":
        if query.dtype in (torch.float16, torch.bfloat16):
            ways += [WAYS["sdpa flash"]] if mask is None else []
            ways += [WAYS["sdpa cudnn"], WAYS["sdpa cudnn wide"]]
            ways += _ways_of_packages(attention, query, key, mask)
        asks = mask is not None  # the blocks' counts, of the device
        by_blocks = is_intervals(mask) if asks else kind == "causal"
        recorded = is_recorded(query) if asks else torch.compiler.is_compiling()
        if by_blocks and query.shape[2] > 1 and not recorded:
            ways.append(WAYS["flex_attention"])
    kernel, groups = attention.kernel, key.shape[1]
    ratio = query.shape[1] // groups
    if (
        kernel is not None
        and kernel.supports(query.shape[3], query.dtype, ratio, query.device)
        and (mask is None or is_intervals(mask))
        and attention.output_norms is None  # the norms are of the two maps' own outputs
        and isinstance(attention.subln, Motif2RMSNorm)  # an adapter around it is not in the kernel
        # A rank's share: the norm's gradient is summed.
        and (groups == attention.num_groups or not query.requires_grad)
    ):
        ways.append(KERNEL)
        if kind == "causal" and kernel.supports_flash(query.shape[3], query.dtype, query.device):
            ways += _ways_of_flash(attention, query, key)
    return ways


def _ways_of_packages(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any) -> list[Way]:
    """The flash attentions that are installed; of intervals they take documents and padding, not windows."""
    if mask is not None:
        # First: compiled code that had looked at the layer's index would be compiled again for every layer.
        if is_recorded(query) or not is_intervals(mask) or query.shape[2] != key.shape[3]:
            return []
        if attention.config.layer_types[attention.layer_idx] == "sliding_attention":
            return []
    return [WAYS[f"flash_attention_{version}"] for version in (2, 3, 4) if _is_installed(version)]


@torch.compiler.assume_constant_result
def _is_installed(version: int) -> bool:
    """Returns whether transformers finds that version; its functions are cached, which tracing warns of."""
    return (is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available)[version - 2]()


def _ways_of_flash(attention: nn.Module, query: torch.Tensor, key: torch.Tensor) -> list[Way]:
    """The ways with FlashAttention-4's passes: its forward gives no largest logits, its backward sums in no order."""
    training = is_training(query, key)
    if not 1 < query.shape[2] <= key.shape[3] or (training and torch.are_deterministic_algorithms_enabled()):
        return []
    return [FLASH_BACKWARD] * training + [FLASH] * (not keeps_max_logits(attention))


def attend_with_kernel(
    attention: nn.Module,
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    way: Way = KERNEL,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the kernel put into the layer.

    Args:
        attention: the `Motif2Attention`.
        signal_query: (B, G * r, T, D).
        noise_query: (B, G, T, D).
        key: (B, G, 2, S, D).
        value: (B, G, 2, S, D).
        mask: intervals (2, B, T), or None for causal order.
        way: whose passes it takes.

    Returns:
        Output after `subln` (B, T, G, r, 2D), and the largest logits (G, r + 1), None of a single token and of
        FlashAttention-4's forward.
    """
    groups = key.shape[1]
    arguments = (
        signal_query.unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4),  # (B, T, G, r, D)
        noise_query.transpose(1, 2),  # (B, T, G, D)
        *(states.permute(0, 3, 1, 2, 4) for states in (key, value)),  # (B, S, G, 2, D)
        attention.lambda_value().to(signal_query.dtype),
        attention.subln.weight,
    )
    options = {"eps": attention.subln.variance_epsilon, "scaling": attention.scaling}
    passes = {"forward": way.forward, "backward": way.backward}
    if mask is not None:
        options["first"], options["last"] = mask
    out_scale = 1 - attention.lambda_init
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in arguments)
    if not wants_gradient and signal_query.shape[2] == 1:
        if torch.compiler.is_compiling():
            # From the index, a constant to the compiler, as the cache's place is: layers compiled one by one make a
            # symbol of the attribute, and Inductor's cache gave them each other's code, with another one's factor.
            out_scale = 1 - lambda_init(attention.layer_idx)
        return attention.kernel.decode(*arguments, out_scale=out_scale, **options), None
    if not (wants_gradient or torch.compiler.is_compiling()):
        return attention.kernel.attend(*arguments, out_scale=out_scale, **passes, **options)
    # A factor of the weight, not of the operator: compiled layers, each with its own, share their code.
    weight = attention.subln.weight * out_scale
    return attention.kernel.attend(*arguments[:-1], weight, out_scale=1.0, **passes, **options)
