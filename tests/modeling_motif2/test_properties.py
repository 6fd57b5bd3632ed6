"""Properties that hold for every configuration: symmetries of the groups, special cases, independence of rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_motif2.layers import Motif2PolyNormMul, Motif2RMSNorm, poly_norm
from tests.modeling_motif2.builders import random_ids, small_config, small_model
from tests.modeling_motif2.reference import poly_norm as reference_poly_norm

EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True)
SHAPES = {
    "groups": st.integers(1, 4),
    "ratio": st.integers(1, 5),
    "seed": st.integers(0, 99),
    "tokens": st.integers(1, 13),
}
BACKEND = st.sampled_from(["eager", "sdpa"])


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def reorder(weight: torch.Tensor, sizes: tuple[int, ...], order: list[int], dim: int) -> None:
    """Permutes blocks of a weight's rows or columns, in place: `sizes` splits them, the first size is permuted."""
    parts = weight.data.unflatten(dim, sizes)
    weight.data.copy_(parts.index_select(dim, torch.tensor(order)).flatten(dim, dim + len(sizes) - 1))


@EXAMPLES
@given(**SHAPES, backend=BACKEND, order=st.randoms(use_true_random=False))
def test_groups_may_be_renumbered(groups, ratio, seed, tokens, backend, order):
    model = small_model(seed=seed, attention=backend, dtype=torch.float64, groups=groups, ratio=ratio)
    ids = random_ids(2, tokens, seed)
    expected = logits(model, ids)
    permutation = order.sample(range(groups), groups)
    for layer in model.model.layers:
        attention = layer.self_attn
        reorder(attention.q_proj.weight, (groups, (ratio + 1) * 8), permutation, 0)
        reorder(attention.k_proj.weight, (groups, 2 * 8), permutation, 0)
        reorder(attention.v_proj.weight, (groups, 2 * 8), permutation, 0)
        reorder(attention.o_proj.weight, (groups, ratio * 16), permutation, 1)
    torch.testing.assert_close(logits(model, ids), expected)


@EXAMPLES
@given(**SHAPES, backend=BACKEND, order=st.randoms(use_true_random=False))
def test_signal_heads_may_be_renumbered_within_their_group(groups, ratio, seed, tokens, backend, order):
    model = small_model(seed=seed, attention=backend, dtype=torch.float64, groups=groups, ratio=ratio)
    ids = random_ids(2, tokens, seed)
    expected = logits(model, ids)
    permutation = order.sample(range(ratio), ratio)
    for layer in model.model.layers:
        attention = layer.self_attn
        query = attention.q_proj.weight.data.view(groups, ratio + 1, 8, -1)
        query[:, :ratio] = query[:, permutation].clone()
        out = attention.o_proj.weight.data.view(-1, groups, ratio, 16)
        out.copy_(out[:, :, permutation].clone())
    torch.testing.assert_close(logits(model, ids), expected)


@EXAMPLES
@given(**SHAPES, backend=BACKEND)
def test_without_noise_it_is_grouped_query_attention(groups, ratio, seed, tokens, backend):
    model = small_model(seed=seed, attention=backend, dtype=torch.float64, groups=groups, ratio=ratio, layers=1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        # exp(0) - exp(lambda_q2 . lambda_k2) + lambda_init = 0
        attention.lambda_q1.zero_()
        attention.lambda_q2.zero_()[0] = 1
        attention.lambda_k2.zero_()[0] = math.log(1 + attention.lambda_init)
        assert abs(attention.lambda_value()) < 1e-12
        states = torch.randn(1, tokens, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        position_embeddings = model.model.rotary_emb(states, torch.zeros(1, tokens, dtype=torch.long))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        given_mask = mask if backend == "sdpa" else torch.where(mask, 0.0, -1e30)
        actual, _ = attention(states, position_embeddings, given_mask)
        query = attention.q_proj(states).view(1, tokens, groups, ratio + 1, 8)[..., :ratio, :].flatten(2, 3)
        key = attention.k_proj(states).view(1, tokens, groups, 2, 8)[..., 0, :]
        value = attention.v_proj(states).view(1, tokens, groups, 16)
        out = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
        expected = attention.o_proj((attention.subln(out) * (1 - attention.lambda_init)).flatten(2))
    torch.testing.assert_close(actual, expected)


@EXAMPLES
@given(groups=st.integers(1, 6), seed=st.integers(0, 99), tokens=st.integers(1, 13), backend=BACKEND)
def test_plain_pairs_are_groups_of_one_signal_head(groups, seed, tokens, backend):
    plain = small_model(seed=seed, attention=backend, groups=groups, ratio=1, num_noise_heads=None)
    grouped = small_model(seed=seed, attention=backend, groups=groups, ratio=1)
    ids = random_ids(2, tokens, seed)
    assert torch.equal(logits(plain, ids), logits(grouped, ids))


@EXAMPLES
@given(**SHAPES, backend=BACKEND, pads=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_rows_and_padding_do_not_mix(groups, ratio, seed, tokens, backend, pads):
    model = small_model(seed=seed, attention=backend, dtype=torch.float64, groups=groups, ratio=ratio)
    row, other = random_ids(1, tokens, seed), random_ids(1, tokens, seed + 1)
    left, right = (torch.zeros(1, count, dtype=torch.long) for count in pads)
    ids = torch.cat([torch.cat([left, row, right], 1), torch.cat([left, other, right], 1)])
    together = logits(model, ids, attention_mask=(ids != 0).long())[:1, pads[0] : pads[0] + tokens]
    torch.testing.assert_close(together, logits(model, row), rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(**SHAPES, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_packed_documents_may_come_in_any_order(groups, ratio, seed, tokens, lengths):
    model = small_model(seed=seed, attention="sdpa", dtype=torch.float64, groups=groups, ratio=ratio)
    documents = [random_ids(1, length, seed + index)[0] for index, length in enumerate(lengths)]

    def packed(rows):
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        return logits(model, torch.cat(rows)[None], position_ids=positions)[0].split([len(row) for row in rows])

    for forward, backward in zip(packed(documents), packed(documents[::-1])[::-1], strict=True):
        torch.testing.assert_close(forward, backward)


@EXAMPLES
@given(
    features=st.integers(1, 70),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_polynorm_is_the_formula_at_every_scale(features, scale, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, features, generator=generator, dtype=torch.float64) * scale).to(dtype)
    module = Motif2PolyNormMul()
    with torch.no_grad():
        module.weight.copy_(torch.randn(3, generator=generator))
        module.bias.copy_(torch.randn(1, generator=generator))
        expected = reference_poly_norm(x.double(), module.weight.double(), module.bias.double())
        wide = poly_norm(x, module.weight, module.bias)
        torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)
        assert module(x, torch.ones_like(x)).dtype == dtype


def test_polynorm_and_the_norm_have_the_gradients_of_their_formulas():
    torch.manual_seed(0)
    x, up = (torch.randn(2, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    module, norm = Motif2PolyNormMul().double(), Motif2RMSNorm(7).double()
    assert torch.autograd.gradcheck(lambda x, up, w, b: poly_norm(x, w, b) * up, (x, up, module.weight, module.bias))
    assert torch.autograd.gradcheck(module, (x, up))
    assert torch.autograd.gradcheck(norm, (x,))


def test_a_row_of_zeros_is_finite():
    x = torch.zeros(1, 4, requires_grad=True)
    out = poly_norm(x, torch.ones(3), torch.full((1,), 0.5))
    out.sum().backward()
    assert torch.equal(out, torch.full((1, 4), 0.5))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lambda_is_computed_in_float32_whatever_it_is_stored_in(dtype):
    attention = small_model(lambda_std_dev=0.5).model.layers[1].self_attn.to(dtype)
    vectors = [getattr(attention, f"lambda_{name}").double() for name in ("q1", "k1", "q2", "k2")]
    expected = torch.exp(vectors[0] @ vectors[1]) - torch.exp(vectors[2] @ vectors[3]) + attention.lambda_init
    assert attention.lambda_value().dtype == torch.float32
    torch.testing.assert_close(attention.lambda_value().double(), expected, rtol=1e-6, atol=1e-6)


def test_configurations_do_not_share_state():
    first, second = small_config(), small_config()
    first.rope_parameters["rope_theta"] = 3.0
    first.auto_map["AutoConfig"] = "changed"
    assert second.rope_parameters["rope_theta"] == 10000.0
    assert second.auto_map == {}
