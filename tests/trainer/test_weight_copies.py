"""Products with bfloat16 copies of the weights: the numbers of autocast, bit for bit."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.trainer.test_execution import POSITIONS, TOKENS, small_model
from tests.trainer.test_loop import curve
from trainer.execution import compile_layers
from trainer.loop import run_pretraining
from trainer.optim import build_muon_clip
from trainer.weight_copies import WeightCopies


def two_steps(model, copies: WeightCopies | None = None) -> list:
    """Losses and gradients of two steps of two micro-batches in bfloat16."""
    optimizer, outcome = build_muon_clip(model, lr=0.01), []
    for _ in range(2):
        if copies is not None:
            copies.refresh()
        for shift in range(2):
            words = TOKENS.roll(shift, 1)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=words, position_ids=POSITIONS, labels=words, use_cache=False).loss
            loss.backward()
            outcome.append(loss.detach())
        outcome += [parameter.grad for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return outcome


@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_are_those_of_autocast_bit_for_bit(tied):
    model, reference = small_model(2), small_model(2)
    for each in (model, reference):
        if tied:
            each.lm_head.weight = each.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    copies = WeightCopies(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(reference.state_dict())
    for one, other in zip(two_steps(model, copies), two_steps(reference), strict=True):
        if tied and one.ndim:  # autograd adds the embedding's part and the head's in another order
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)
        else:
            assert torch.equal(one, other)


def test_a_frozen_weight_gets_no_gradient():
    model = small_model(2)
    frozen = [model.model.layers[0].self_attn.k_proj.weight, model.model.layers[1].mlp.down_proj.weight]
    for weight in frozen:
        weight.requires_grad_(False)
    WeightCopies(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    got_none = [parameter for parameter in model.parameters() if parameter.grad is None]
    assert {id(weight) for weight in got_none} == {id(weight) for weight in frozen}


@pytest.mark.slow
def test_layers_with_copies_share_their_compiled_code():
    models = [small_model(5), small_model(5)]
    counters = []
    for model in models:
        counters.append(CompileCounterWithBackend("aot_eager"))
        compile_layers(model, counters[-1])
    outcomes = [two_steps(models[0], WeightCopies(models[0])), two_steps(models[1])]
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert all(counter.frame_count <= 3 for counter in counters)  # see TestCompilation


def test_a_run_with_copies_has_the_same_curve(make_config, tmp_path, monkeypatch):
    settings = {"mixed_precision": "bf16", "micro_batch_tokens": 64, "total_tokens": 128 * 3, "decay_tokens": 0}
    casts, curves = [], []
    original = WeightCopies.refresh
    monkeypatch.setattr(WeightCopies, "refresh", lambda self: (casts.append(self), original(self)))
    for copies in (False, True):
        config = make_config(output_dir=str(tmp_path / str(copies)), weight_copies=copies, **settings)
        run_pretraining(config)
        curves.append(curve(config.output_dir))
        assert len(casts) == copies * (1 + 3 + 2 * 2)  # made; steps; evaluations of two domains at start and end
    assert curves[0] == curves[1]


def test_copies_that_cannot_be_are_refused(make_config):
    with pytest.raises(ValueError, match="weight_copies with mixed_precision no and fp8 none"):
        make_config(weight_copies=True)
