"""Checkpoints of parallel MuonClip: plain and distributed, resumed bit for bit on other ranks and layouts."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from tests.distributed import run_distributed
from tests.trainer.optim.helpers import Bag, distribute, groups_of, shard_fully, train
from trainer.optim import ParallelMuonClip

TENSOR_PARALLEL = (-2,)


def make(mesh_shape: tuple[int, ...] = ()) -> tuple[Bag, ParallelMuonClip]:
    """A bag, sharded or (on a two-dimensional mesh) sharded and replicated, and its optimizer."""
    bag = Bag(torch.float32)
    if mesh_shape == TENSOR_PARALLEL:
        distribute(bag, init_device_mesh("cpu", (2,)), lambda p: [Shard(1 if p.shape == (6, 16) else 0)])
    elif mesh_shape:
        shard_fully(
            bag, init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
        )
    return bag, ParallelMuonClip(groups_of(bag), lr=0.1)


def save(rank, mesh_shape, folder):
    bag, optimizer = make(mesh_shape)
    train(bag, optimizer, steps=2)
    model_state, optimizer_state = get_state_dict(bag, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def resume(rank, mesh_shape, folder):
    bag, optimizer = make(mesh_shape)
    for parameter in bag.parameters():
        torch.nn.init.zeros_(parameter)
    model_state, optimizer_state = get_state_dict(bag, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(bag, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    return train(bag, optimizer, steps=2, first=3)


@pytest.mark.distributed
def test_a_distributed_checkpoint_resumes_anywhere_bit_for_bit(tmp_path):
    expected = train(*make(), steps=4)
    run_distributed(save, 4, (4,), tmp_path / "sharded")
    run_distributed(save, 2, (2,), tmp_path / "two")
    run_distributed(save, 2, TENSOR_PARALLEL, tmp_path / "tensor")
    resumed = [
        *run_distributed(resume, 2, (2,), tmp_path / "sharded"),
        *run_distributed(resume, 4, (2, 2), tmp_path / "two"),
        *run_distributed(resume, 1, (), tmp_path / "two"),
        *run_distributed(resume, 2, (2,), tmp_path / "tensor"),
    ]
    for result in resumed:
        for name, value in result.items():
            assert torch.equal(value, expected[name]), name


def test_learning_rates_set_after_loading_count():
    # load_state_dict puts new group dicts in place, which a plan made before it must not hide
    (bag, optimizer), (other, peer) = make(), make()
    for trained, stepper in ((bag, optimizer), (other, peer)):
        train(trained, stepper, steps=1)
        if stepper is optimizer:
            stepper.load_state_dict(copy.deepcopy(stepper.state_dict()))
        for group in stepper.param_groups:
            group["lr"] = 0.01
    result, expected = (train(*pair, steps=1, first=2) for pair in ((bag, optimizer), (other, peer)))
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_a_plain_state_dict_resumes_bit_for_bit():
    expected = train(*make(), steps=4)
    bag, optimizer = make()
    train(bag, optimizer, steps=2)
    saved = copy.deepcopy((bag.state_dict(), optimizer.state_dict()))
    bag, optimizer = make()
    bag.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    result = train(bag, optimizer, steps=2, first=3)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.distributed
def test_whole_tensors_are_no_state_of_shards():
    # an accelerator's kernels would take the first rows of a whole momentum for any rank's own
    bag, optimizer = make()
    train(bag, optimizer, steps=1)
    saved = optimizer.state_dict()

    def load(rank):
        _, sharded = make((2,))
        with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 \(18, 5\) of group 0 is a whole tensor"):
            sharded.load_state_dict(saved)

    run_distributed(load, 2)


def test_state_of_another_shape_is_refused():
    bag, optimizer = make()
    train(bag, optimizer, steps=1)
    saved = optimizer.state_dict()
    saved["state"][2]["momentum_buffer"] = torch.zeros(8, 6)
    with pytest.raises(ValueError, match=r"parameter 2 \(16, 6\) of group 0 has the shape \(8, 6\)"):
        make()[1].load_state_dict(saved)
