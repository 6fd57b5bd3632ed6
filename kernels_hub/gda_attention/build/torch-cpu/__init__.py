"""Grouped differential attention in one pass: `gda_attention` to train and prefill, `gda_decode` for one token."""

from .ops import gda_attention, gda_decode, packed_intervals, supports, supports_flash

__all__ = ["gda_attention", "gda_decode", "packed_intervals", "supports", "supports_flash"]
