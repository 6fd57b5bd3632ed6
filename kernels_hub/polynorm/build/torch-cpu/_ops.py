"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops._polynorm_cpu_a83aedb


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"_polynorm_cpu_a83aedb::{op_name}"
