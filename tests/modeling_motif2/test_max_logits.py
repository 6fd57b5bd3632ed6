"""The gated maximum of attention logits: exact above the gate, never below the truth, in torch and in the kernel."""

import math

import pytest
import torch

from modeling_motif2.diagnostics import attention_modules, track_max_logits
from modeling_motif2.max_logits import largest_logits
from tests.modeling_motif2.builders import random_ids, small_model
from trainer.optim import build_muon_clip

GATES = (-math.inf, 0.5, 1.5, 100.0)


def true_maxima(query, key, visible, scaling: float) -> torch.Tensor:
    """The definition, in float64."""
    query, key = query.double(), key.double()
    _, heads, tokens, _ = query.shape
    groups, length = key.shape[1:3]
    if visible is None:
        visible = torch.ones(tokens, length).tril(length - tokens).bool()[None, None]
    result = torch.empty(heads)
    for head in range(heads):
        logits = query[:, head] @ key[:, head * groups // heads].mT * scaling  # (B, T, S)
        result[head] = logits.masked_fill(~visible[:, 0].expand_as(logits), -math.inf).max()
    return result.view(groups, -1)


def check(shape: tuple, dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
    batch, groups, ratio, tokens, length, dim = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    query = torch.randn(batch, tokens, groups * ratio, dim, generator=generator).to(device, dtype).transpose(1, 2)
    key = torch.randn(batch, groups, dim, length, generator=generator).to(device, dtype).transpose(2, 3)
    visible = None
    if layout == "masked":
        visible = torch.rand(batch, 1, tokens, length, generator=generator) < 0.5
        key[:, :, -1] = 1e3  # a position that nobody sees must not count where logits are computed
        visible[..., -1] = False
        visible = visible.to(device)
    scaling = 0.25 * dim**-0.5
    truth = true_maxima(query.cpu(), key.cpu(), None if visible is None else visible.cpu(), scaling)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for gate in GATES:
        found = largest_logits(query, key, visible, scaling, gate).cpu()
        assert found.dtype == torch.float32
        assert found.shape == (groups, ratio)
        above = truth > gate + tolerance
        torch.testing.assert_close(found[above], truth[above], rtol=tolerance, atol=tolerance)
        assert (found[~above] >= truth[~above] - tolerance).all()
        assert (found[~above] <= max(gate, 0) + tolerance + truth[~above].clamp(min=0)).all()


CASES = [
    ((1, 1, 1, 1, 1, 8), torch.float32, "causal"),
    ((2, 2, 3, 65, 65, 24), torch.float32, "causal"),
    ((1, 2, 1, 7, 150, 16), torch.float32, "causal"),
    ((2, 1, 4, 33, 130, 100), torch.float32, "masked"),
    ((2, 2, 2, 70, 70, 32), torch.float16, "causal"),
]
SMALL_CASES = [
    CASES[0],
    ((2, 2, 3, 33, 33, 24), torch.float32, "causal"),
    ((1, 1, 4, 17, 66, 20), torch.float32, "masked"),
    ((1, 2, 1, 7, 40, 16), torch.float16, "causal"),
]
ACCELERATOR_CASES = [*CASES, ((2, 2, 4, 300, 300, 128), torch.bfloat16, "causal")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case):
    check(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ACCELERATOR_CASES, ids=str)
def test_triton(case):
    check(*case, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bound_is_never_below_the_logit_of_parallel_vectors(dtype):
    query = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    for token in query.split(1, dim=2):
        length = float(token.double().square().sum())
        bound = largest_logits(token, token, None, 1.0, 1e6)
        assert length <= float(bound) <= 1.001 * length


SIZES = ("heads", "ratio", "tokens", "length", "dim")
STRIDES = tuple(
    f"{name}_{axis}" for name, axes in (("query", "bhtd"), ("key", "bgsd"), ("visible", "bts")) for axis in axes
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ones", [(), SIZES, STRIDES], ids=["any", "sizes of 1", "strides of 1"])
def test_kernel_compiles_for_hopper(masked, ones):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modeling_motif2.max_logits import _kernel

    # Triton turns an argument that equals 1 into a constant.
    constants = {"MASKED": masked, "TILE": 64, "BLOCK_D": 128} | dict.fromkeys(ones, 1)
    signature = {name: "constexpr" if name in constants else "i32" for name in _kernel.arg_names}
    signature |= {"query": "*bf16", "key": "*bf16", "visible": "*i1", "scaling": "fp32", "gate": "fp32"}
    signature |= dict.fromkeys(("query_lengths", "key_lengths", "largest"), "*fp32")
    source = ASTSource(fn=_kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.metadata.shared <= 101_376  # two programs fit a multiprocessor


def steps_with(gate: float | None, threshold: float) -> tuple[list[torch.Tensor], list[int]]:
    """Weights after three steps of MuonClip, and the heads that each step clipped."""
    model = small_model(attention="sdpa", ratio=3)
    optimizer = build_muon_clip(model, lr=0.02, qk_clip_threshold=threshold)
    track_max_logits(model, gate=gate)
    clipped = []
    for step in range(3):
        ids = random_ids(2, 12, seed=step)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clipped.append(optimizer.clip_report()["clipped_heads"])
    return [parameter.detach().clone() for parameter in model.parameters()], clipped


@pytest.mark.parametrize("threshold", [0.05, 0.3, 50.0])
def test_the_gate_changes_nothing_that_qk_clip_does(threshold):
    exact, clipped = steps_with(None, threshold)
    gated, clipped_gated = steps_with(threshold, threshold)
    assert clipped == clipped_gated
    assert (sum(clipped) > 0) == (threshold < 1)
    for expected, actual in zip(exact, gated, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_below_the_gate_nothing_quadratic_is_computed(monkeypatch):
    model = small_model(attention="sdpa", ratio=3)
    track_max_logits(model, gate=1e6)
    matmul = torch.matmul
    sizes = []
    monkeypatch.setattr(torch, "matmul", lambda a, b: sizes.append(b.shape[-1]) or matmul(a, b))
    with torch.no_grad():
        model(random_ids(1, 37))
    assert 37 not in sizes
    assert all((module.max_logits > 0).all() for module in attention_modules(model))
    track_max_logits(model)
    with torch.no_grad():
        model(random_ids(1, 37))
    assert 37 in sizes
