"""flash-attention's two functions in plain PyTorch, so that everything around them in transformers is the real thing.

Shapes: B batch, T query tokens, S key tokens, H heads, D head dimension.
"""

import torch
from transformers import modeling_flash_attention_utils as flash_utils


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
):
    """Rows without padding, (B, T, H, D) in and out; the last query stands at the last key."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "flash attention needs values as wide as keys"
    assert causal
    assert not dropout_p
    tokens, length, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (states.repeat_interleave(repeats, dim=2) for states in (k, v))
    key = torch.arange(length)
    query = key[length - tokens :, None]
    seen = key <= query
    if window_size[0] >= 0:
        seen = seen & (key >= query - window_size[0])
    logits = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    return torch.einsum("bhts,bshd->bthd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    """Documents one after another, (all tokens, H, D) in and out; borders are int32, and the longest must be told."""
    parts = []
    for borders, longest, states in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert borders.dtype == torch.int32
        assert (int(borders[0]), int(borders[-1])) == (0, len(states))
        assert int(longest) == int(borders.diff().max())
    for start, end, first, last in zip(
        cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
    ):
        options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
        parts.append(flash_attn_func(q[None, start:end], k[None, first:last], v[None, first:last], **options)[0])
    return torch.cat(parts)


def install(monkeypatch) -> None:
    """Makes transformers take these functions for the installed package's."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: (functions, process))
