"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops._polynorm_rocm_b764bb4


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"_polynorm_rocm_b764bb4::{op_name}"
