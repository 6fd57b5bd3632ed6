"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops._gda_attention_rocm_91d034f


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"_gda_attention_rocm_91d034f::{op_name}"
