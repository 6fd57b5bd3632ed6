"""The model against the float64 reference: shapes, padding, packing, caches and generation."""

import random

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_motif2.attention import lambda_init
from modeling_motif2.layers import Motif2RotaryEmbedding, poly_norm
from tests.modeling_motif2.builders import random_ids, small_config, small_model
from tests.modeling_motif2.reference import reference_logits

# RoPE's angles are float32 in the model whatever its dtype: that is what is left in float64.
FLOAT64_TOLERANCE = 2e-5


def reference_error(model, logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Largest error of a document's logits (T, vocabulary) over the reference's largest; NaN stays below no bound."""
    expected = reference_logits(model, ids)
    return float((logits.double() - expected).abs().max() / expected.abs().max())


def random_shape(seed: int) -> dict:
    """A configuration drawn by seed: ratio 1-8, groups 1-8, plain pairs now and then."""
    draw = random.Random(seed)
    groups, ratio = draw.randint(1, 8), draw.randint(1, 8)
    plain = draw.random() < 0.2
    return {
        "groups": groups,
        "ratio": 1 if plain else ratio,
        "layers": draw.randint(1, 3),
        "head_dim": draw.choice((2, 4, 6, 16)),
        "hidden_size": draw.choice((16, 24, 40)),
        "intermediate_size": draw.choice((8, 33, 64)),
        "rope_theta": draw.choice((100.0, 10000.0, 1e6)),
        "tie_word_embeddings": draw.random() < 0.3,
        "rms_norm_eps": draw.choice((1e-6, 0.03)),
        "attn_rms_norm_eps": draw.choice((1e-5, 0.1)),
    } | ({"num_noise_heads": None} if plain else {})


BACKENDS = ("eager", "sdpa", "flex_attention")


@pytest.mark.parametrize("seed", range(33))
def test_random_configurations_match_the_reference(seed):
    draw = random.Random(1000 + seed)
    model = small_model(seed=seed, attention=BACKENDS[seed % 3], dtype=torch.float64, **random_shape(seed))
    lengths = [draw.randint(1, 19) for _ in range(3)]
    documents = [random_ids(1, length, seed=seed + i)[0] for i, length in enumerate(lengths)]
    side = draw.choice(("left", "right", "packed"))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if side == "packed":
            position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
            row = model(torch.cat(documents)[None], position_ids=position_ids, use_cache=draw.random() < 0.5).logits[0]
            outputs = row.split(lengths)
        else:
            ids, mask = torch.zeros(3, max(lengths), dtype=torch.long), torch.zeros(3, max(lengths), dtype=torch.long)
            spans = [slice(max(lengths) - n, None) if side == "left" else slice(0, n) for n in lengths]
            for row, (span, document) in enumerate(zip(spans, documents, strict=True)):
                ids[row, span], mask[row, span] = document, 1
            logits = model(ids, attention_mask=mask).logits
            outputs = [logits[row, span] for row, span in enumerate(spans)]
    for document, output in zip(documents, outputs, strict=True):
        assert reference_error(model, output, document) < FLOAT64_TOLERANCE


def test_cached_steps_equal_one_forward():
    model = small_model(dtype=torch.float64, attention="sdpa")
    ids = random_ids(2, 13)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for step in (5, 1, 1, 4, 2):
            start = sum(part.shape[1] for part in parts)
            out = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)


def test_greedy_generation_equals_repeated_forwards():
    model = small_model(dtype=torch.float64, attention="sdpa")
    ids = random_ids(2, 7)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_polynorm_gives_the_published_values():
    x = torch.tensor([1.0, -2.0, 0.5, -0.25], dtype=torch.float64)
    y = poly_norm(x, torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.05]))
    torch.testing.assert_close(y, torch.tensor([0.554770, -0.683406, 0.228870, -0.007552]).double(), atol=1e-6, rtol=0)


WIDER = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": WIDER,
    "llama3": WIDER | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": WIDER | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
}


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("tokens", [20, 200])
def test_scaled_rope_is_that_of_transformers(kind, tokens):
    rope = {"rope_type": kind, "rope_theta": 1e4} | ROPE[kind]
    sizes = {"rope_parameters": rope, "max_position_embeddings": 128, "head_dim": 8}
    ours = Motif2RotaryEmbedding(small_config(rope_theta=None, **sizes))
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4, **sizes))
    arguments = torch.zeros(1, tokens, 32), torch.arange(tokens)[None]
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))


def test_lambda_init_counts_layers_from_zero():
    assert lambda_init(0) == pytest.approx(-0.0099, abs=1e-4)
    assert lambda_init(1) == pytest.approx(0.2)
