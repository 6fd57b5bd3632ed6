"""The pipeline's two lanes: memory of one is not given back while the other may read it, and bits do not change."""

import contextlib
import weakref

import pytest
import torch

from trainer.optim import pipeline
from trainer.optim.communication import Team
from trainer.optim.layout import Block, Layout
from trainer.optim.plan import plan_chunks

SHAPES = [(48, 32), (32, 48), (48, 32), (16, 16), (48, 32)]


def run(orthogonalise, device: str = "cpu", beside=None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Updates of five matrices in several rounds of one rank."""
    layouts = [Layout(shape, (0,), (Block(((0, shape[0]),), ((0, shape[1]),)),), (0,)) for shape in SHAPES]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    updates = [torch.empty_like(direction) for direction in directions]
    chunks = plan_chunks(layouts, 0, lambda rows, columns: rows * columns, 1, True)
    assert len(chunks) > 2
    device = torch.device(device)
    pipeline.run_pipeline(
        chunks,
        SHAPES,
        Team([0], 1.0, device),
        lambda number, out: out.copy_(directions[number]),
        orthogonalise,
        lambda number, update: updates[number].copy_(update),
        dtype,
        dtype,
        device,
        beside=beside,
    )
    return updates


def test_batches_live_until_the_shards_lane_waits_for_the_products(monkeypatch):
    batches = []

    class RecordedLanes(pipeline.Lanes):
        """Lanes without streams that look whether what products read is still there."""

        def __init__(self, beside, device):
            self.stream, self.current = beside, None

        def beside(self):
            return contextlib.nullcontext()

        def mark(self):
            return None

        def lend(self, update):
            pass

        def shards_follow(self):
            assert all(batch() is not None for batch in batches)
            batches.clear()

    def negated(batch):
        batches.append(weakref.ref(batch))
        return -batch

    expected = run(torch.neg)
    monkeypatch.setattr(pipeline, "Lanes", RecordedLanes)
    assert all(map(torch.equal, run(negated, beside="a stream"), expected))
    assert batches == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_streams_give_the_bits_of_one(dtype):
    def slow(batch):
        product = batch
        for _ in range(50):
            product = product @ product.mT @ product / product.norm(dim=(1, 2), keepdim=True) ** 2
        return product

    expected = run(slow, "cuda", dtype=dtype)
    for _ in range(5):
        found = run(slow, "cuda", torch.cuda.Stream(), dtype)
        assert all(map(torch.equal, found, expected))
