"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops._polynorm_cuda_3ce8f2c


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"_polynorm_cuda_3ce8f2c::{op_name}"
