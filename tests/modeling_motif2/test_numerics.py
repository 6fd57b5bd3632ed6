"""bfloat16 beside float32: loss, gradients, and a short training, within the bounds that README.md states."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.modeling_motif2.builders import random_ids, small_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "ratio": 4,
    "layers": 4,
    "initializer_range": 0.05,
}
# Measured on 5 seeds, and here with a margin of 2: loss 1.2e-4, gradients as one vector 9.5e-3, training 8e-4.
LOSS_BOUND, GRADIENT_BOUND, TRAINING_BOUND = 2.4e-4, 2e-2, 1.6e-3


def gradient(model, ids, autocast):
    """Loss and all gradients as one vector."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([part.flatten().float() for part in gradients])


def measured(seed: int) -> tuple[float, float]:
    """Relative error of the loss and of the gradient under bfloat16 autocast."""
    model = small_model(seed=seed, attention="sdpa", lambda_std_dev=0.1, **SIZES).train()
    ids = random_ids(4, 48, seed)
    wide_loss, wide = gradient(model, ids, autocast=False)
    half_loss, half = gradient(model, ids, autocast=True)
    return abs(half_loss - wide_loss) / wide_loss, float((half - wide).norm() / wide.norm())


def test_loss_and_gradients_under_bfloat16_stay_close():
    for seed in range(2):
        loss_error, gradient_error = measured(seed)
        assert 0 < loss_error < LOSS_BOUND
        assert 0 < gradient_error < GRADIENT_BOUND


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
def test_weights_in_bfloat16_stay_close(tmp_path, norms):
    """As `from_pretrained(dtype=torch.bfloat16)` leaves them, norms in float32, and with every weight in bfloat16."""
    wide = small_model(seed=0, attention="sdpa", lambda_std_dev=0.1, **SIZES)
    wide.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    if norms == torch.bfloat16:
        half = half.to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16, norms}
    ids = random_ids(4, 48, 0)
    (wide_loss, wide_gradient), (half_loss, half_gradient) = (gradient(model, ids, False) for model in (wide, half))
    assert 0 < abs(half_loss - wide_loss) / wide_loss < LOSS_BOUND
    assert 0 < float((half_gradient - wide_gradient).norm() / wide_gradient.norm()) < GRADIENT_BOUND


@pytest.mark.parametrize("made", ["cast", "loaded", "cast twice", "autocast"])
def test_rope_keeps_its_angles_far_into_the_context(tmp_path, made):
    """In bfloat16 a frequency is off by a part in 500, and angles are many turns off after 32,768 tokens."""
    model = small_model()
    if made == "loaded":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    elif made != "autocast":
        model.bfloat16().to(torch.float32 if made == "cast twice" else torch.bfloat16)
    positions = torch.tensor([[0, 1, 4095, 32767]])
    states = torch.zeros(1, 4, 32, dtype=torch.bfloat16 if made == "loaded" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=made == "autocast"):
        cos, sin = model.model.rotary_emb(states, positions)
    angles = (positions[..., None].double() * 10000.0 ** -(torch.arange(0, 8, 2) / 8).double()).repeat(1, 1, 2)
    for found, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        assert found.dtype == states.dtype
        assert (found.double() - wanted).abs().max() < (3e-3 if made != "loaded" else 7e-3)


def test_the_rotary_embedding_moves_with_its_model():
    rotary = small_model().model.rotary_emb.to("meta", torch.float16)
    assert rotary.inv_freq.is_meta
    assert rotary.original_inv_freq.is_meta
    assert rotary.inv_freq.dtype == torch.float32


def train(seed: int, autocast: bool, steps: int = 30) -> list[float]:
    """Losses of a short training on rows that continue arithmetic progressions."""
    model = small_model(seed=seed, attention="sdpa", lambda_std_dev=0.1, **SIZES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        start = torch.randint(0, 58, (8, 1), generator=generator)
        ids = (start + torch.arange(24) * 5) % 58 + 3
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_training_in_bfloat16_follows_float32():
    wide, half = train(0, autocast=False), train(0, autocast=True)
    assert wide[-1] < 0.5 * wide[0]
    assert max(abs(a - b) / a for a, b in zip(wide, half, strict=True)) < TRAINING_BOUND
