"""What `gda_attention.py` compares: our kernel and the libraries, on inputs in the kernel's shapes.

Every way takes signal_query, noise_query, key, value, lambda and weight, and intervals of visible keys where it can.

Shapes: B rows, T tokens, G groups, r signal heads a group, D head dimension.
"""

import contextlib
from collections.abc import Callable

import torch
from attention_cases import EPS, OUT_SCALE, epilogue
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CAUSAL_ONLY = ("ours, flash backward", "ours, flash", "flash-attn-4 x4", "flash-attn-4 x4, compiled", "sdpa flash x4")
PACKED_ONLY = ("flash-attn-4 varlen x4, compiled",)


def ours(kernel, forward: str = "own", backward: str = "own") -> Callable:
    """Our kernel on inputs in its shapes, with its own passes or FlashAttention-4's."""

    def attend(inputs, **intervals):
        options = {"out_scale": OUT_SCALE, "eps": EPS, "forward": forward, "backward": backward}
        return kernel.gda_attention(*inputs, **options, **intervals)[0]

    return attend


def library(backend: SDPBackend | None, wide: bool, finish: Callable = epilogue) -> Callable:
    """Signal and noise maps by SDPA on the same inputs: four calls, or two with the value in one piece."""

    def attend(inputs, first=None, last=None):
        signal_query, noise_query, key, value, lambda_, weight = inputs
        groups, ratio = signal_query.shape[2:4]
        mask = None
        if first is not None:
            keys = torch.arange(key.shape[1], device=key.device)
            mask = ((keys >= first[..., None]) & (keys <= last[..., None]))[:, None]
        parts = (value.flatten(3),) if wide else value.unbind(3)  # (B, S, G, 2D) or two of (B, S, G, D)
        outputs = []
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            for query, half in ((signal_query.flatten(2, 3), 0), (noise_query, 1)):
                keys_of = key[:, :, :, half].transpose(1, 2)
                pieces = []
                for part in parts:
                    states = [query.transpose(1, 2), keys_of, part.transpose(1, 2)]
                    if wide or mask is not None:  # kernels that share keys among queries want plain cases
                        repeats = states[0].shape[1] // groups
                        states[1:] = [each.repeat_interleave(repeats, dim=1) for each in states[1:]]
                    piece = scaled_dot_product_attention(
                        *states, attn_mask=mask, is_causal=mask is None, enable_gqa=not wide and mask is None
                    )
                    pieces.append(piece.transpose(1, 2))
                outputs.append(torch.cat(pieces, dim=-1))  # (B, T, heads, 2D)
        signal, noise = outputs[0].unflatten(2, (groups, ratio)), outputs[1][:, :, :, None]
        return finish(signal, noise, lambda_, weight)

    return attend


def flash4(flash_attn_func: Callable, finish: Callable) -> Callable:
    """Four calls of FlashAttention-4, in causal order."""

    def attend(inputs):
        signal_query, noise_query, key, value, lambda_, weight = inputs
        outputs = []
        for query, half in ((signal_query.flatten(2, 3), 0), (noise_query, 1)):
            pieces = [flash_attn_func(query, key[:, :, :, half], part, causal=True) for part in value.unbind(3)]
            pieces = [piece[0] if isinstance(piece, tuple) else piece for piece in pieces]
            outputs.append(torch.cat(pieces, dim=-1))  # (B, T, heads, 2D)
        signal, noise = outputs[0].unflatten(2, signal_query.shape[2:4]), outputs[1][:, :, :, None]
        return finish(signal, noise, lambda_, weight)

    return attend


def flash4_of_documents(flash_attn_varlen_func: Callable, finish: Callable) -> Callable:
    """Four calls of FlashAttention-4 over the documents of one row."""
    known = {}

    def attend(inputs, first=None, last=None):
        signal_query, noise_query, key, value, lambda_, weight = (each.squeeze(0) for each in inputs)
        if first.data_ptr() not in known:
            starts = torch.cat((first[0].unique(), first.new_tensor([first.shape[1]])))
            known[first.data_ptr()] = starts, int(starts.diff().max())
        starts, longest = known[first.data_ptr()]
        options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        outputs = []
        for query, half in ((signal_query.flatten(1, 2), 0), (noise_query, 1)):
            pieces = [
                flash_attn_varlen_func(query, key[:, :, half], part, causal=True, **options)
                for part in value.unbind(2)
            ]
            outputs.append(torch.cat([piece[0] if isinstance(piece, tuple) else piece for piece in pieces], dim=-1))
        signal, noise = outputs[0].unflatten(1, signal_query.shape[1:3]), outputs[1][:, :, None]
        return finish(signal[None], noise[None], lambda_, weight)

    return attend


def flexible(device: torch.device) -> Callable:
    """Four calls of FlexAttention with a block mask of the visible intervals."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    masks = {}

    def attend(inputs, first=None, last=None):
        signal_query, noise_query, key, value, lambda_, weight = inputs
        tokens, groups, ratio = signal_query.shape[1:4]
        name = (tokens, None if first is None else first.data_ptr())
        if name not in masks:

            def seen(batch, head, query, key):
                return key <= query if first is None else (key <= query) & (key >= first[0, query])

            masks[name] = create_block_mask(seen, None, None, tokens, tokens, device=device.type)
        outputs = []
        for query, half in ((signal_query.flatten(2, 3), 0), (noise_query, 1)):
            states = [query.transpose(1, 2), key[:, :, :, half].transpose(1, 2)]
            pieces = [
                compiled(*states, part.transpose(1, 2), block_mask=masks[name], enable_gqa=True).transpose(1, 2)
                for part in value.unbind(3)
            ]
            outputs.append(torch.cat(pieces, dim=-1))
        signal, noise = outputs[0].unflatten(2, (groups, ratio)), outputs[1][:, :, :, None]
        return epilogue(signal, noise, lambda_, weight)

    return attend


def ways(kernel, dim: int, device: torch.device, everything: bool) -> dict[str, Callable]:
    """What is compared, by name, for heads of `dim`: the fastest libraries, or `everything`."""
    found = {"ours": ours(kernel)}
    if device.type == "cuda":
        compiled = torch.compile(epilogue, dynamic=False)
        try:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
        except ImportError as error:
            print(f"without flash-attn-4: {error}")
        else:
            found["flash-attn-4 x4"] = flash4(flash_attn_func, epilogue)
            found["flash-attn-4 x4, compiled"] = flash4(flash_attn_func, compiled)
            found[PACKED_ONLY[0]] = flash4_of_documents(flash_attn_varlen_func, compiled)
        found["sdpa cudnn x4"] = library(SDPBackend.CUDNN_ATTENTION, False)
        found["sdpa cudnn x4, compiled"] = library(SDPBackend.CUDNN_ATTENTION, False, compiled)
    if everything or device.type == "cpu":
        found["sdpa"] = library(None, False)
        found["flex x4"] = flexible(device)
    if everything and device.type == "cuda":
        found["sdpa flash x4"] = library(SDPBackend.FLASH_ATTENTION, False)
        found["sdpa cudnn wide x2"] = library(SDPBackend.CUDNN_ATTENTION, True)
    if kernel.supports_flash(dim, torch.bfloat16, device):
        found["ours, flash backward"] = ours(kernel, "own", "flash")
        found["ours, flash"] = ours(kernel, "flash", "flash")
    return found
