"""Namespace of this build's operators (generated)."""

import torch

ops = torch.ops._decode_products_rocm_116fd52


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator of this build."""
    return f"_decode_products_rocm_116fd52::{op_name}"
