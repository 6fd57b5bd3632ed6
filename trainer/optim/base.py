"""What MuonClip is beside its arithmetic: it refuses bad settings and groups, and counts the steps it skipped."""

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.optim.gradients import names_of

QK_CLIP_RULES = ("official", "q_only", "compensated")


class CheckedOptimizer(torch.optim.Optimizer):
    """An optimizer of "muon" and "adamw" groups.

    Args:
        params: parameters or groups.
        defaults: of every group: lr, momentum, weight_decay, betas, eps, algorithm.
        adamw_lr: default lr of "adamw" groups.

    Raises:
        ValueError: what `check_group` refuses, or a learning rate that is no number from 0.
    """

    def __init__(self, params: Iterable, defaults: dict, adamw_lr: float):
        _check_number("lr", defaults["lr"], math.inf)
        _check_number("adamw_lr", adamw_lr, math.inf)
        self.adamw_lr, self.skipped_steps = adamw_lr, 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, at construction or later; a group that is refused is not kept."""
        adamw_defaults = {"lr": self.adamw_lr} if param_group.get("algorithm") == "adamw" else {}
        super().add_param_group(adamw_defaults | param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict:
        """torch's, and the count of skipped steps."""
        return super().state_dict() | {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state; without a count (a distributed checkpoint keeps none) this optimizer's own stays.

        Raises:
            ValueError: a parameter's state is spread over ranks or shaped as the parameter is not.
        """
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names_of(self.param_groups), parameters, strict=True):
            for key, value in self.state.get(parameter, {}).items():
                if key != "step":
                    _check_state(f"{key} of {name}", value, parameter)
        self.skipped_steps = state_dict.get("skipped_steps", self.skipped_steps)


def check_group(group: dict) -> None:
    """Check a parameter group, its defaults filled in.

    Raises:
        ValueError: an unknown algorithm, a number out of range, or a Muon parameter that is no matrix.
    """
    if group["algorithm"] not in ("muon", "adamw"):
        raise ValueError(f"algorithm is {group['algorithm']!r}: choose 'muon' or 'adamw'")
    for name, below in (("lr", math.inf), ("weight_decay", math.inf), ("eps", math.inf), ("momentum", 1)):
        _check_number(name, group[name], below)
    if len(group["betas"]) != 2:
        raise ValueError(f"betas is {group['betas']}: give two numbers")
    for beta in group["betas"]:
        _check_number("one of betas", beta, 1)
    if group["algorithm"] == "muon" and any(parameter.ndim != 2 for parameter in group["params"]):
        raise ValueError(
            "a Muon group holds a parameter that is no matrix: give it to an 'adamw' group; where FSDP 1 has made it "
            "flat, take FSDP2"
        )


def check_qk_clip(threshold: float, rule: str, attentions: Iterable[nn.Module], groups: list[dict]) -> None:
    """Check QK-clip's settings and its attention modules.

    Raises:
        ValueError: a threshold that is no positive number, an unknown rule, or a module that cannot be clipped.
    """
    if not (isinstance(threshold, Real) and threshold > 0):
        raise ValueError(f"qk_clip_threshold is {threshold!r}: give a positive logit, or None for no clip")
    if rule not in QK_CLIP_RULES:
        raise ValueError(f"qk_clip_rule is {rule!r}: choose one of {QK_CLIP_RULES}")
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    for attention in attentions:
        check_gate(attention, threshold)
        if not {id(attention.q_proj.weight), id(attention.k_proj.weight)} <= optimised:
            raise ValueError(
                "an attention module's q_proj or k_proj weight is not optimised: leave it out of attentions"
            )


def check_gate(attention: nn.Module, threshold: float) -> None:
    """Check that an attention module's logits above the threshold are exact: up to its gate they may be mere bounds.

    Raises:
        ValueError: they are not.
    """
    gate = getattr(attention, "max_logits_gate", None)
    if gate is not None and gate > threshold:
        raise ValueError(f"max_logits_gate {gate} is above qk_clip_threshold {threshold}: lower it")


def _check_state(name: str, value: Tensor, parameter: Tensor) -> None:
    if isinstance(value, DTensor) != isinstance(parameter, DTensor):
        given, wanted = ("a whole tensor", "a shard")[:: -1 if isinstance(value, DTensor) else 1]
        raise ValueError(
            f"{name} is {given} and its parameter {wanted}: load it by torch.distributed.checkpoint.state_dict"
        )
    if value.shape != parameter.shape:
        raise ValueError(
            f"{name} has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}: load the state of "
            "the same model"
        )


def _check_number(name: str, value: float | Tensor, below: float) -> None:
    if not isinstance(value, Real | Tensor) or not 0 <= value < below:
        limit = "" if math.isinf(below) else f" below {below}"
        raise ValueError(f"{name} is {value!r}: give a number from 0{limit}")
