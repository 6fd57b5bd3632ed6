"""The head's loss in chunks of the vocabulary, against all logits at once."""

import builtins

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.head_loss import HeadLoss, chunked_log_probabilities

WORDS, WIDTH = 700, 24


def make_head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WORDS, bias=False)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (R, T, C), and targets (R, T) of which some are not predicted."""
    hidden = torch.randn(3, 17, WIDTH, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, WORDS, (3, 17), generator=torch.Generator().manual_seed(2))
    targets[0, 5:9] = targets[2, -1] = -100
    return hidden, targets


def losses_and_gradients(kind: str, dtype=torch.float32, compiled: bool = False):
    head = make_head()
    loss = HeadLoss(head, kind, compiled)
    hidden, targets = inputs()
    hidden.requires_grad_()
    with loss.targets(targets), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = head(hidden)
    (losses.sum() * 0.37).backward()
    return losses.detach(), hidden.grad, head.weight.grad


def test_losses_are_cross_entropy_and_zero_where_nothing_is_predicted():
    hidden, targets = inputs()
    logits = make_head()(hidden)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    for kind in ("full", "chunked"):
        losses = losses_and_gradients(kind)[0]
        torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-6)
        assert losses.dtype == torch.float32
        assert (losses[targets == -100] == 0).all()


@pytest.mark.slow
def test_a_compiled_cross_entropy_gives_the_same():
    for one, other in zip(losses_and_gradients("full", compiled=True), losses_and_gradients("full"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_chunks_give_the_gradients_of_all_logits(monkeypatch):
    monkeypatch.setattr("trainer.head_loss.CHUNK_WORDS", 256)  # two whole chunks and a part
    for one, other in zip(losses_and_gradients("chunked"), losses_and_gradients("full"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_chunks_are_as_near_to_float32_as_all_logits():
    exact = losses_and_gradients("full")
    errors = {}
    for kind in ("chunked", "full"):
        found = losses_and_gradients(kind, torch.bfloat16)
        errors[kind] = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert all(error < 1e-2 for error in errors["full"])
    assert all(one <= 1.1 * other for one, other in zip(errors["chunked"], errors["full"], strict=True))


def test_the_head_gives_logits_again_outside():
    head = make_head()
    hidden, targets = inputs()
    wanted = head(hidden)
    loss = HeadLoss(head, "chunked")
    assert torch.equal(head(hidden), wanted)
    with pytest.raises(RuntimeError, match="stop"), loss.targets(targets):
        raise RuntimeError("stop")
    assert torch.equal(head(hidden), wanted)


def test_chunks_keep_no_logits():
    kept = []
    head = make_head()
    loss = HeadLoss(head, "chunked")
    hidden, targets = inputs()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    with hooks, loss.targets(targets):
        head(hidden.requires_grad_())
    assert max(kept) == head.weight.numel() < targets.numel() * WORDS


def test_auto_takes_chunks_for_large_vocabularies_only():
    assert not HeadLoss(nn.Linear(8, 32_000, device="meta"), "auto").takes_chunks(4096)
    assert HeadLoss(nn.Linear(8, 219_520, device="meta"), "auto").takes_chunks(4096)
    assert not HeadLoss(nn.Linear(8, 219_520, device="meta"), "full").takes_chunks(4096)
    with pytest.raises(ValueError, match="loss is 'fused': choose one of auto, full, chunked"):
        HeadLoss(make_head(), "fused")


def test_without_trl_chunks_are_refused_and_logits_still_work(monkeypatch):
    original = builtins.__import__

    def without_trl(name, *args, **kwargs):
        if name.split(".")[0] == "trl":
            raise ImportError("no trl")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_trl)
    with pytest.raises(ValueError, match=r"no trl\): pip install 'trl>=1\.16,<1\.17', or set loss full"):
        HeadLoss(make_head(), "chunked")
    with pytest.raises(ValueError, match="cannot be imported"):
        chunked_log_probabilities()
    head = make_head()
    hidden, targets = inputs()
    with HeadLoss(head, "auto").targets(targets):
        assert head(hidden).shape == targets.shape
