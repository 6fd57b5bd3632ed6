"""Which parameter goes where: MuonClip's groups, by name.

Everything that is a matrix inside a decoder layer is Muon's; embeddings, the head and everything that is not a matrix
are AdamW's. Source: arXiv 2511.07464, section 4.3.
"""

import re
from collections.abc import Iterable, Mapping

from torch import nn

MATRICES = "matrices"
# first match wins; what matches nothing is "matrices" if it is a matrix, else "other"
_GROUP_PATTERNS = {
    "lambda": r"(^|\.)lambda_[qk][12]$",
    "polynorm": r"(^|\.)act_fn\.(weight|bias)$",
    "norms": r"[^.]*(norm|subln)[^.]*\.(weight|bias)$",
    "embeddings": r"(^|\.)(embed_tokens|wte)\.",
    "head": r"(^|\.)(lm_head|score|classifier|qa_outputs)\.",
}
GROUP_NAMES = (MATRICES, *_GROUP_PATTERNS, "other")
_VECTOR_GROUPS = ("lambda", "polynorm", "norms")
_UNDECAYED_GROUPS = ("lambda", "polynorm", "norms", "other")  # assumption: the report names one decay for everything


def group_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float = 0.1,
    learning_rates: Mapping[str, float] | None = None,
    weight_decays: Mapping[str, float] | None = None,
    adamw_patterns: str | Iterable[str] = (),
) -> list[dict]:
    """Sort the trainable parameters into groups for `MuonClip` or `ParallelMuonClip`.

    Args:
        named_parameters: names and parameters, as `model.named_parameters()` gives them; frozen ones are left out.
        lr: learning rate of every group that `learning_rates` does not name.
        weight_decay: decoupled decay of matrices, embeddings and head; the other groups have none by default.
        learning_rates: learning rate by group name.
        weight_decays: weight decay by group name.
        adamw_patterns: one or more regular expressions; a matrix whose name has a match goes to AdamW's group "other".

    Returns:
        list: one dict a group that is not empty: params, names, group_name, algorithm, lr, weight_decay.

    Raises:
        ValueError: nothing to train, a setting for an unknown or empty group, a pattern that matches no matrix, or a
            matrix under a name that is AdamW's (norms, PolyNorm, lambda).
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUP_NAMES}
    patterns = {adamw_patterns} if isinstance(adamw_patterns, str) else set(adamw_patterns)
    unmatched = set(patterns)
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        group = _group_of(name, parameter)
        hits = {pattern for pattern in patterns if group == MATRICES and re.search(pattern, name)}
        unmatched -= hits
        members["other" if hits else group].append((name, parameter))
    if unmatched:
        raise ValueError(f"adamw_patterns {sorted(unmatched)} match no trainable matrix: correct or remove them")
    filled = [name for name in GROUP_NAMES if members[name]]
    if not filled:
        raise ValueError("no parameter requires a gradient: nothing to optimise")
    for setting, given in (("learning_rates", learning_rates), ("weight_decays", weight_decays)):
        wrong = sorted(set(given or {}) - set(filled))
        if wrong:
            raise ValueError(f"{setting} names {wrong}, but the trainable parameters form the groups {filled}")
    return [
        {
            "params": [parameter for _, parameter in members[name]],
            "names": [parameter_name for parameter_name, _ in members[name]],
            "group_name": name,
            "algorithm": "muon" if name == MATRICES else "adamw",
            "lr": (learning_rates or {}).get(name, lr),
            "weight_decay": (weight_decays or {}).get(name, 0.0 if name in _UNDECAYED_GROUPS else weight_decay),
        }
        for name in filled
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    for group, pattern in _GROUP_PATTERNS.items():
        if re.search(pattern, name):
            if group in _VECTOR_GROUPS and parameter.ndim > 1:
                shape = tuple(parameter.shape)
                raise ValueError(f"{name} of shape {shape} is a matrix in the AdamW-only group {group!r}: rename it")
            return group
    return MATRICES if parameter.ndim == 2 else "other"
