"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops._newton_schulz_rocm_e6f7ae4


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"_newton_schulz_rocm_e6f7ae4::{op_name}"
