"""MuonClip on one device, plainly: the meaning of everything else in this package.

Shapes: A rows and B columns of a weight, G groups, H query heads, K = 2G key heads, D head_dim.
Source: arXiv 2511.07464, section 4.3 (update); Kimi K2, arXiv 2507.20534 (QK-clip, RMS matching).
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
QK_CLIP_RULES = ("official", "q_only", "compensated")


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


def clip_scales(max_logits: Tensor, num_signal_heads: int, threshold: float, rule: str) -> tuple[Tensor, Tensor]:
    """Factors of QK-clip for the rows of each query and each key head.

    Args:
        max_logits: (..., H) largest scaled logit of each query head, by groups of `num_signal_heads` signal heads,
            which share the group's first key head, and a noise head, which reads the second; -inf clips nothing.
        num_signal_heads: signal heads a group.
        threshold: logit above which a head is clipped.
        rule: "official" scales a shared key by the smallest of its heads' sqrt(gamma) and each query by its own;
            "q_only" scales queries by gamma; "compensated" scales the key as "official" does and each query by what
            is left, so that every head's logits shrink by exactly its gamma.

    Returns:
        tuple: query factors (..., H) and key factors (..., K), in the dtype of `max_logits`.
    """
    gamma = torch.where(max_logits > threshold, threshold / max_logits, 1.0)
    gamma = gamma.unflatten(-1, (-1, num_signal_heads + 1))  # (..., G, signal heads + 1)
    signal, noise = gamma[..., :-1], gamma[..., -1:]
    keys = torch.cat((signal.amin(-1, keepdim=True), noise), dim=-1).sqrt()  # (..., G, 2)
    if rule == "official":
        return gamma.sqrt().flatten(-2), keys.flatten(-2)
    if rule == "q_only":
        return gamma.flatten(-2), torch.ones_like(keys).flatten(-2)
    return torch.cat((signal / keys[..., :1], noise / keys[..., 1:]), dim=-1).flatten(-2), keys.flatten(-2)


class MuonClip(torch.optim.Optimizer):
    """Muon with QK-clip for matrices and AdamW for the rest.

    Args:
        params: parameters or groups; each group may set "algorithm" ("muon" or "adamw"), "lr", "weight_decay".
        lr: learning rate of the Muon groups. momentum: Nesterov momentum. weight_decay: decoupled decay of all groups.
        adamw_lr, adamw_betas, adamw_eps: AdamW's settings; its learning rate is `lr` where None.
        qk_clip_threshold: largest attention logit left alone. qk_clip_rule: see `clip_scales`.
        attentions: modules with q_proj, k_proj, num_signal_heads_per_group, head_dim and `max_logits` (H,), the
            largest logits of the forward passes since the last step, or None.

    Raises:
        ValueError: a setting out of range, an unknown algorithm or rule, a Muon parameter that is no matrix.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1, adamw_lr=None, adamw_betas=(0.9, 0.95),
                 adamw_eps=1e-8, qk_clip_threshold=100.0, qk_clip_rule="official", attentions=()):  # fmt: skip
        if not qk_clip_threshold > 0:
            raise ValueError(f"qk_clip_threshold is {qk_clip_threshold}: give a positive logit, such as 100")
        if qk_clip_rule not in QK_CLIP_RULES:
            raise ValueError(f"qk_clip_rule is {qk_clip_rule!r}: choose one of {QK_CLIP_RULES}")
        for gate in (getattr(attention, "max_logits_gate", None) for attention in attentions):
            if gate is not None and gate > qk_clip_threshold:  # logits up to the gate may be mere bounds
                raise ValueError(f"max_logits_gate {gate} is above qk_clip_threshold {qk_clip_threshold}: lower it")
        self.qk_clip_threshold, self.qk_clip_rule, self.attentions = qk_clip_threshold, qk_clip_rule, list(attentions)
        self.skipped_steps, self._report = 0, {"clipped_heads": 0, "max_logit": -math.inf}
        self._adamw_lr = lr if adamw_lr is None else adamw_lr
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": adamw_betas}
        super().__init__(params, defaults | {"eps": adamw_eps, "algorithm": "muon"})

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, at construction or later."""
        if (algorithm := param_group.get("algorithm", "muon")) not in ("muon", "adamw"):
            raise ValueError(f"algorithm is {algorithm!r}: choose 'muon' or 'adamw'")
        super().add_param_group({"lr": self._adamw_lr} | param_group if algorithm == "adamw" else param_group)
        if algorithm == "muon" and any(p.ndim != 2 for p in self.param_groups[-1]["params"]):
            raise ValueError("a Muon group holds a parameter that is no matrix: give it to an 'adamw' group")

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
        if not any(group["lr"] > 0 for group in self.param_groups):  # a checkpoint's load steps once with lr 0
            return
        for attention in (module for module in self.attentions if module.max_logits is not None):
            logits = attention.max_logits.to(torch.promote_types(torch.float32, attention.q_proj.weight.dtype))  # (H,)
            heads = attention.num_signal_heads_per_group
            scales = clip_scales(logits, heads, self.qk_clip_threshold, self.qk_clip_rule)  # (H,), (K,)
            for projection, scale in zip((attention.q_proj, attention.k_proj), scales, strict=True):
                projection.weight.mul_(scale.repeat_interleave(attention.head_dim)[:, None])  # (H * D, B)
            self._report["clipped_heads"] += int((logits > self.qk_clip_threshold).sum())
            self._report["max_logit"] = max(self._report["max_logit"], float(logits.max()))
