"""PolyNorm of split features under transformers' tensor parallelism: a style "poly_norm", registered on import.

The model's own plan gathers gate_proj and up_proj before PolyNorm. With `split_mlp` their outputs stay split, and a
row's sums are added over the ranks instead: 3 float32 a row forward and 4 backward, not the row's features.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .sources import load_local

STYLES = {"gate_proj": "colwise", "act_fn": "poly_norm", "up_proj": "colwise", "down_proj": "rowwise"}


class PolyNormParallel(TensorParallelLayer):
    """Gated PolyNorm whose rows are split evenly over the ranks; its weight and bias are the same on every rank."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Replaces the forward of `module` and says in `module.reduces_over_ranks` over how many ranks it adds.

        A forward that takes its place later, as `kernels.kernelize` would put there, is refused when it is called.

        Args:
            module: has weight (3,), bias (1,), eps, and forward(x, mul).
            mesh: the ranks that share a row.

        Returns:
            nn.Module: `module`.

        Raises:
            KernelUnavailable: this checkout's kernel has not been built.
        """
        poly_norm_mul = load_local("polynorm").tensor_parallel.poly_norm_mul
        group = mesh.get_group()

        def forward(x: torch.Tensor, mul: torch.Tensor) -> torch.Tensor:
            return poly_norm_mul(x, mul, module.weight, module.bias, module.eps, group=group)

        def refuse_another(module: nn.Module, inputs: tuple) -> None:
            if module.__dict__.get("forward") is not forward:
                raise RuntimeError(
                    f"the forward of {type(module).__name__} was replaced (by kernelize?) after its features were "
                    f"split over {mesh.size()} ranks, and would take a part of a row for the whole: leave it, or "
                    "use the model's own plan, which gathers the features"
                )

        module.forward = forward
        module.register_forward_pre_hook(refuse_another)
        module.reduces_over_ranks = mesh.size()
        return module


def split_mlp(plan: dict[str, str]) -> dict[str, str]:
    """A tensor parallel plan whose MLPs keep their features split from gate_proj and up_proj to down_proj.

    `config.base_model_tp_plan = split_mlp(config.base_model_tp_plan)` before the model is made or loaded.

    Args:
        plan: style by module name, as in `base_model_tp_plan` or `model.tp_plan`.

    Returns:
        dict[str, str]: a new plan.

    Raises:
        ValueError: the plan names no `mlp.gate_proj`.
    """
    mlps = [name.removesuffix("gate_proj") for name in plan if name.endswith("mlp.gate_proj")]
    if not mlps:
        raise ValueError(f"the plan names no mlp.gate_proj, only {sorted(plan)}: is it a Motif-2 model's?")
    return plan | {mlp + name: style for mlp in mlps for name, style in STYLES.items()}


ALL_PARALLEL_STYLES.register("poly_norm", PolyNormParallel())
