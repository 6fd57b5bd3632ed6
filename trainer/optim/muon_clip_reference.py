"""MuonClip on one device, plainly: the meaning of everything else in this package.

Shapes: A rows and B columns of a weight, G groups, H query heads, K = 2G key heads, D head_dim.
Source: arXiv 2511.07464, section 4.3 (update); Kimi K2, arXiv 2507.20534 (QK-clip, RMS matching).
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from trainer.optim.base import CheckedOptimizer, check_gate, check_qk_clip

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz_reference(matrix: Tensor, coefficients=COEFFICIENTS) -> Tensor:
    """Orthogonalise `matrix` (A, B) by quintic Newton-Schulz steps in its own dtype; returns (A, B)."""
    x = matrix.mT if matrix.size(0) > matrix.size(1) else matrix  # rows <= columns
    x = x / (x.norm() + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.size(0) > matrix.size(1) else x


def update_scale(rows: int, columns: int) -> float:
    """Factor that gives an orthogonalised update the root mean square of an AdamW update, from the full shape."""
    return 0.2 * math.sqrt(max(rows, columns))


def is_hot(max_logits: Tensor, threshold: float) -> Tensor:
    """Which logits QK-clip acts on: those above the threshold, if they are numbers."""
    return (max_logits > threshold) & (max_logits < math.inf)


def clip_scales(max_logits: Tensor, num_signal_heads: int, threshold: float, rule: str) -> tuple[Tensor, Tensor]:
    """Factors of QK-clip for the rows of each query and each key head.

    Args:
        max_logits: (..., H) largest scaled logit of each query head, by groups of `num_signal_heads` signal heads,
            which share the group's first key head, and a noise head, which reads the second; an infinity or a NaN
            clips nothing.
        num_signal_heads: signal heads a group.
        threshold: logit above which a head is clipped.
        rule: "official" scales a shared key by the smallest of its heads' sqrt(gamma) and each query by its own;
            "q_only" scales queries by gamma; "compensated" scales the key as "official" does and each query by what
            is left, so that every head's logits shrink by exactly its gamma.

    Returns:
        tuple: query factors (..., H) and key factors (..., K), in the dtype of `max_logits`.
    """
    gamma = torch.where(is_hot(max_logits, threshold), threshold / max_logits, 1.0)
    gamma = gamma.unflatten(-1, (-1, num_signal_heads + 1))  # (..., G, signal heads + 1)
    signal, noise = gamma[..., :-1], gamma[..., -1:]
    keys = torch.cat((signal.amin(-1, keepdim=True), noise), dim=-1).sqrt()  # (..., G, 2)
    if rule == "official":
        return gamma.sqrt().flatten(-2), keys.flatten(-2)
    if rule == "q_only":
        return gamma.flatten(-2), torch.ones_like(keys).flatten(-2)
    return torch.cat((signal / keys[..., :1], noise / keys[..., 1:]), dim=-1).flatten(-2), keys.flatten(-2)


class MuonClip(CheckedOptimizer):
    """Muon with QK-clip for matrices and AdamW for the rest.

    Args:
        params: parameters or groups; each group may set "algorithm" ("muon" or "adamw"), "lr", "weight_decay".
        lr: learning rate of the Muon groups. momentum: Nesterov momentum. weight_decay: decoupled decay of all groups.
        adamw_lr, adamw_betas, adamw_eps: AdamW's settings; its learning rate is `lr` where None.
        qk_clip_threshold: largest attention logit left alone; None: no clip. qk_clip_rule: see `clip_scales`.
        attentions: modules with q_proj, k_proj, num_signal_heads_per_group, head_dim and `max_logits` (H,), the
            largest logits of the forward passes since the last step, or None. One is clipped in steps in which both
            weights have a gradient.

    Raises:
        ValueError: a setting, a group or an attention module that `base` refuses.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1, adamw_lr=None, adamw_betas=(0.9, 0.95),
                 adamw_eps=1e-8, qk_clip_threshold=100.0, qk_clip_rule="official", attentions=()):  # fmt: skip
        qk_clip_threshold = math.inf if qk_clip_threshold is None else qk_clip_threshold
        self.qk_clip_threshold, self.qk_clip_rule, self.attentions = qk_clip_threshold, qk_clip_rule, list(attentions)
        self._report = {"clipped_heads": 0, "max_logit": -math.inf}
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": adamw_betas}
        defaults |= {"eps": adamw_eps, "algorithm": "muon"}
        super().__init__(params, defaults, lr if adamw_lr is None else adamw_lr)
        check_qk_clip(qk_clip_threshold, qk_clip_rule, self.attentions, self.param_groups)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters, or none (counted in `skipped_steps`) if a gradient holds a NaN or an infinity."""
        loss = torch.enable_grad()(closure)() if closure else None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            for group in self.param_groups:
                step = self._step_muon if group["algorithm"] == "muon" else self._step_adamw
                for parameter in (p for p in group["params"] if p.grad is not None):
                    step(group, parameter, self.state[parameter])
            self._clip_queries_and_keys()
        else:
            self.skipped_steps += 1
        for attention in (module for module in self.attentions if module.max_logits is not None):
            attention.max_logits.fill_(-math.inf)
        return loss

    def clip_report(self) -> dict:
        """Number of heads that the last step clipped, and the largest logit it saw (-inf: none recorded)."""
        return dict(self._report, skipped_steps=self.skipped_steps)

    def _step_muon(self, group, weight, state):
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(weight))
        momentum.mul_(group["momentum"]).add_(weight.grad)
        update = newton_schulz_reference(weight.grad + group["momentum"] * momentum)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(group["lr"] * update_scale(*weight.shape) * update)

    def _step_adamw(self, group, weight, state):
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        adamw([weight], [weight.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], foreach=False,
              amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)  # fmt: skip

    def _clip_queries_and_keys(self):
        self._report = {"clipped_heads": 0, "max_logit": -math.inf}
        moves = any(group["lr"] > 0 for group in self.param_groups)  # a checkpoint's load steps once with lr 0
        for attention in (module for module in self.attentions if module.max_logits is not None):
            check_gate(attention, self.qk_clip_threshold)
            weights, heads = (attention.q_proj.weight, attention.k_proj.weight), attention.num_signal_heads_per_group
            logits = attention.max_logits.to(torch.promote_types(torch.float32, weights[0].dtype))  # (H,)
            self._report["max_logit"] = max(self._report["max_logit"], float(logits.max()))
            if not moves or any(weight.grad is None for weight in weights):
                continue
            scales = clip_scales(logits, heads, self.qk_clip_threshold, self.qk_clip_rule)  # (H,), (K,)
            for weight, scale in zip(weights, scales, strict=True):
                weight.mul_(scale.repeat_interleave(attention.head_dim)[:, None])  # (H * D, B)
            self._report["clipped_heads"] += int(is_hot(logits, self.qk_clip_threshold).sum())
