"""What goes wrong in training leaves parallel MuonClip's ranks in step with each other, or ends with a clear error."""

import math
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from tests.distributed import run_distributed
from tests.trainer.optim.helpers import (
    SHAPES,
    Bag,
    attention_of,
    full_parameters,
    full_tensors,
    groups_of,
    set_gradients,
    shard_fully,
)
from trainer.optim import MuonClip, ParallelMuonClip
from trainer.optim.communication import Team

pytestmark = pytest.mark.distributed


def sharded(rank, world_size, **options):
    """A bag under FSDP2, its attention and its optimizer."""
    bag = Bag()
    shard_fully(bag, init_device_mesh("cpu", (world_size,)))
    attention = attention_of(bag, rank, world_size)
    options = {"lr": 0.1, "method": "classic", "attentions": [attention]} | options
    return bag, attention, ParallelMuonClip(groups_of(bag), **options)


def local_values(bag, optimizer) -> list[torch.Tensor]:
    """Copies of all local parameters and states."""
    tensors = [value for p in bag.parameters() for value in (p, *optimizer.state[p].values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all():
    def run(rank):
        bag, attention, optimizer = sharded(rank, 2)
        set_gradients(bag, 1)
        optimizer.step()
        before, outcomes = local_values(bag, optimizer), []
        for poison in (math.nan, -math.inf):
            set_gradients(bag, 2)
            if rank == 1:
                bag.vector.grad.to_local()[-1] = poison
            attention.max_logits.fill_(400.0)
            optimizer.step()
            outcomes.append(all(map(torch.equal, before, local_values(bag, optimizer))))
            outcomes.append(bool((attention.max_logits == -math.inf).all()))
        return outcomes, optimizer.clip_report()["skipped_steps"]

    assert run_distributed(run, 2) == [([True] * 4, 2)] * 2


def test_a_gradient_missing_on_one_rank_counts_as_zero_there():
    def run(rank):
        bag, _, optimizer = sharded(rank, 2, attentions=())
        set_gradients(bag, 1)
        if rank == 1:
            bag.gate.grad = bag.vector.grad = None
        optimizer.step()
        return full_parameters(bag)

    bag = Bag()
    set_gradients(bag, 1)
    bag.gate.grad[8:] = 0
    bag.vector.grad[5:] = 0
    MuonClip(groups_of(bag), lr=0.1).step()
    for result in run_distributed(run, 2):
        for name, value in full_parameters(bag).items():
            torch.testing.assert_close(result[name], value, rtol=0, atol=1e-12)


def test_a_gradient_missing_everywhere_leaves_the_parameter_and_its_momentum_alone():
    def run(rank):
        bag, _, optimizer = sharded(rank, 2, attentions=())
        bag.gate.requires_grad_(False)  # frozen in the middle of training
        before = full_parameters(bag)
        set_gradients(bag, 1, names=[name for name in SHAPES if name not in ("gate", "vector")])
        optimizer.step()
        after = full_parameters(bag)
        moved = {name for name in SHAPES if not torch.equal(before[name], after[name])}
        momentum = float(optimizer.state[bag.gate]["momentum_buffer"].to_local().abs().sum())
        return moved, momentum, float(optimizer.state[bag.vector]["step"])

    assert run_distributed(run, 2) == [(set(SHAPES) - {"gate", "vector"}, 0.0, 0.0)] * 2


@pytest.mark.parametrize("mesh_shape", [(), (2, 1)], ids=["plain", "replicas"])
def test_a_gradient_that_only_some_copies_have_is_refused(mesh_shape):
    def run(rank):
        bag = Bag()
        if mesh_shape:
            shard_fully(bag, init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")))
        optimizer = ParallelMuonClip(groups_of(bag), lr=0.1, timeout_seconds=10)
        messages = []
        for name, stated in (("gate", r"parameter 2 \(16, 6\) of group 0"), ("vector", "group 1")):
            before = full_parameters(bag)
            set_gradients(bag, 1)
            if rank == 1:
                getattr(bag, name).grad = None
            with pytest.raises(ValueError, match=f"only some ranks have a gradient of .*{stated}") as error:
                optimizer.step()
            assert all(torch.equal(before[name], value) for name, value in full_parameters(bag).items())
            messages.append(str(error.value))
        return messages

    first, second = run_distributed(run, 2)
    assert first == second


def partial_sums(rank, value: float) -> DTensor:
    """A gradient whose parts are still to be summed."""
    mesh = init_device_mesh("cpu", (2,))
    return DTensor.from_local(torch.full((4, 4), value), mesh, [Partial()])


def test_gradients_in_other_placements_are_brought_to_the_parameters():
    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        weight = nn.Parameter(distribute_tensor(torch.eye(4), mesh, [Shard(0)]))
        optimizer = ParallelMuonClip([weight], lr=0.1, method="classic", timeout_seconds=5)
        weight.grad = partial_sums(rank, 1.0 + rank)
        optimizer.step()
        moved = weight.full_tensor().detach()
        weight.grad = partial_sums(rank, 3e38)  # finite parts of an infinite sum
        optimizer.step()
        assert torch.equal(weight.full_tensor(), moved)
        assert optimizer.skipped_steps == 1
        weight.grad = partial_sums(rank, 1.0) if rank == 0 else None
        with pytest.raises(ValueError, match="has other placements than"):
            optimizer.step()
        return moved

    weight = nn.Parameter(torch.eye(4))
    weight.grad = torch.full((4, 4), 3.0)
    MuonClip([weight], lr=0.1).step()
    for moved in run_distributed(run, 2):
        torch.testing.assert_close(moved, weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("frozen", ["q_proj", "k_proj"])
def test_a_layer_that_is_frozen_later_is_not_clipped(frozen):
    def run(rank):
        bag, _, optimizer = sharded(rank, 2)
        getattr(bag, frozen).requires_grad_(False)
        before = getattr(bag, frozen).full_tensor().clone()
        set_gradients(bag, 1, names=[name for name in SHAPES if name != frozen])
        optimizer.step()
        same = torch.equal(before, getattr(bag, frozen).full_tensor())
        return same, optimizer.clip_report()["clipped_heads"], optimizer.clip_report()["max_logit"]

    assert run_distributed(run, 2) == [(True, 0, 400.0)] * 2


def test_only_the_latest_plans_are_kept():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(5)]
    optimizer = ParallelMuonClip(weights, lr=0.1)
    for step in range(1, 32):
        for index, weight in enumerate(weights):
            weight.grad = torch.ones(2, 2) if step >> index & 1 else None
        optimizer.step()
    assert len(optimizer._plans) <= 8


def test_parameters_on_several_devices_are_refused():
    here, there = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"parameters lie on cpu, meta"):
        ParallelMuonClip([here, there], lr=0.1).step()


def test_a_wide_matrix_behind_a_narrow_one_keeps_its_precision():
    narrow, wide = nn.Parameter(torch.ones(8, 4)), nn.Parameter(full_tensors(1)["gate"])
    alone = nn.Parameter(wide.detach().clone())
    narrow.grad, wide.grad = torch.ones(8, 4), full_tensors(2)["gate"]
    alone.grad = wide.grad.clone()
    ParallelMuonClip([narrow, wide], lr=0.1, method="classic").step()
    MuonClip([alone], lr=0.1).step()
    torch.testing.assert_close(wide.detach(), alone.detach(), rtol=0, atol=1e-12)


def test_zero_gradients_only_decay():
    def run(rank):
        bag, _, optimizer = sharded(rank, 2, attentions=(), weight_decay=0.5)
        before = full_parameters(bag)
        for parameter in bag.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return before, full_parameters(bag)

    for before, after in run_distributed(run, 2):
        for name in set(SHAPES) - {"vector"}:
            torch.testing.assert_close(after[name], 0.95 * before[name])


def test_a_step_with_lr_zero_makes_state_and_changes_no_weight():
    def run(rank):
        bag, _, optimizer = sharded(rank, 2)
        before = full_parameters(bag)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0)
        for parameter in bag.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = full_parameters(bag)
        same = all(torch.equal(before[name], after[name]) for name in SHAPES)
        same &= optimizer.clip_report()["clipped_heads"] == 0
        placements = [optimizer.state[p]["momentum_buffer"].placements == p.placements for p in bag.parameters()
                      if p.ndim == 2]  # fmt: skip
        return same, all(placements), len(placements)

    assert run_distributed(run, 2) == [(True, True, len(SHAPES) - 1)] * 2


def test_parameters_added_later_join_the_plan():
    late = full_tensors(7)["down"]

    def add(bag, optimizer, place):
        set_gradients(bag, 1)
        optimizer.step()
        parameter = nn.Parameter(place(late.clone()))
        optimizer.add_param_group({"params": [parameter]})
        set_gradients(bag, 2)
        parameter.grad = place(full_tensors(8)["down"])
        optimizer.step()
        return parameter.detach()

    def run(rank):
        bag, _, optimizer = sharded(rank, 2, attentions=())
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match="no matrix"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        return add(bag, optimizer, lambda full: distribute_tensor(full, mesh, [Shard(1)])).full_tensor()

    bag = Bag()
    expected = add(bag, MuonClip(groups_of(bag), lr=0.1), lambda full: full)
    for added in run_distributed(run, 2):
        torch.testing.assert_close(added, expected, rtol=0, atol=1e-12)


def test_a_rank_that_does_not_come_is_a_clear_error():
    def run(rank):
        bag, _, optimizer = sharded(rank, 2, timeout_seconds=2)
        set_gradients(bag, 1)
        optimizer.step()
        if rank == 1:
            time.sleep(5)
            return ""
        with pytest.raises(RuntimeError, match=r"rank 0 lost a rank among \[0, 1\].* within 2 s") as error:
            optimizer.step()
        return str(error.value)

    assert "restart from the last checkpoint" in run_distributed(run, 2)[0]


@pytest.mark.parametrize("when", ["before the step", "between two rounds"])
def test_a_rank_that_dies_is_a_clear_error(when):
    def run(rank):
        bag, _, optimizer = sharded(rank, 2, timeout_seconds=60, chunk_size=1)
        set_gradients(bag, 1)
        optimizer.step()
        if rank == 1 and when == "before the step":
            os._exit(1)
        if rank == 1:
            optimizer.orthogonalise.kernels.newton_schulz = lambda *_, **__: os._exit(1)
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"rank 0 lost a rank among \[0, 1\]: it died, or did not"):
        run_distributed(run, 2, timeout_seconds=30)  # the other learns of it before its own timeout


def test_ranks_of_a_team_may_know_different_numbers_of_groups():
    # PyTorch names a group that its members alone make after the number of groups that each of them knows
    def run(rank):
        dist.new_group([0])
        found = []
        for _ in range(2 if rank < 2 else 0):
            team = Team([0, 1], 5.0, torch.device("cpu"))
            found.append(team.maximum(torch.tensor([float(rank)])).item())
        dist.new_group([1, 2])  # the names of other groups are still the same everywhere
        return found

    assert run_distributed(run, 3) == [[1.0, 1.0], [1.0, 1.0], []]


def test_a_lack_of_memory_is_no_lost_rank():
    team = Team([0], 1.0, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"), team.clear_errors():
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")


def test_a_failed_launch_is_a_lost_rank_with_copy_engines_only():
    failed, other = "CUDA error: unspecified launch failure", "CUDA error: an illegal memory access"
    for copy_engines, said in ((True, failed), (True, other), (False, failed)):
        team = Team([0], 1.0, torch.device("cpu"), copy_engines)
        with pytest.raises(RuntimeError) as error, team.clear_traps():
            raise torch.AcceleratorError(said)
        assert ("lost a rank among [0]" in str(error.value)) == (copy_engines and said == failed)
        assert said in str(error.value)


def test_ranks_that_disagree_are_refused():
    options = {
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 0.2,
        "adamw_betas": (0.8, 0.9),
        "adamw_eps": 1e-6,
        "chunk_size": 2,
        "pipelined": False,
        "method": "gram",
        "coefficients": "jordan",
        "backend": "torch",
        "wire_dtype": torch.float32,
        "qk_clip_threshold": 50.0,
        "qk_clip_rule": "q_only",
    }

    def run(rank):
        for name, value in options.items():
            _, _, optimizer = sharded(rank, 2, **({name: value} if rank else {}))
            with pytest.raises(ValueError, match="differ between ranks"):
                optimizer.step()

    run_distributed(run, 2)


def test_a_gate_raised_above_the_threshold_is_refused():
    bag = Bag()
    attention = attention_of(bag)
    optimizer = ParallelMuonClip(groups_of(bag), lr=0.1, attentions=[attention])
    attention.max_logits_gate = 200.0
    with pytest.raises(ValueError, match=r"max_logits_gate 200.0 is above qk_clip_threshold 100.0"):
        optimizer.step()


def test_logits_that_are_no_numbers_on_one_rank_hide_none_of_another():
    def run(rank):
        bag, attention, optimizer = sharded(rank, 2)
        attention.max_logits = torch.where(attention.max_logits.isinf(), math.nan, attention.max_logits)
        set_gradients(bag, 1)
        optimizer.step()
        report = optimizer.clip_report()
        return report["clipped_heads"], report["max_logit"]

    assert run_distributed(run, 2) == [(3, 400.0)] * 2


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_a_logit_that_is_no_number_clips_nothing(logit):
    bag = Bag()
    attention = attention_of(bag)
    attention.max_logits = torch.full_like(attention.max_logits, logit)
    optimizer = ParallelMuonClip([{"params": [bag.q_proj, bag.k_proj]}], lr=1e-30, weight_decay=0.0,
                                 attentions=[attention])  # fmt: skip
    before = bag.q_proj.detach().clone()
    bag.q_proj.grad, bag.k_proj.grad = torch.zeros_like(bag.q_proj), torch.zeros_like(bag.k_proj)
    optimizer.step()
    assert torch.equal(bag.q_proj, before)
    assert optimizer.clip_report()["clipped_heads"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": 1.5}, "chunk_size is 1.5"),
        ({"max_replicas": 0}, "max_replicas is 0"),
        ({"wire_dtype": torch.int8}, "wire_dtype is torch.int8"),
        ({"wire_dtype": "bf16"}, "wire_dtype is 'bf16'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"mode": "serial"}, "mode is 'serial'"),
        ({"method": "svd"}, "method"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
        ({"timeout_seconds": math.inf}, "timeout_seconds is inf"),
        ({"chunk_size": True}, "chunk_size is True"),
        ({"pipelined": "no"}, "pipelined is 'no'"),
        ({"copy_engines": "no"}, "copy_engines is 'no'"),
        ({"qk_clip_threshold": -1.0}, "qk_clip_threshold is -1.0"),
        ({"attentions": [attention_of(Bag())]}, "not optimised"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelMuonClip(groups_of(Bag()), **{"lr": 0.1} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator can run them")
@pytest.mark.parametrize("backend", ["triton", "quack"])
def test_a_backend_that_cannot_run_here_raises(backend):
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run on cpu"):
        ParallelMuonClip(groups_of(Bag()), lr=0.1, backend=backend)


@pytest.mark.distributed
def test_a_team_connects_all_its_ranks_when_it_is_made(monkeypatch):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))

    def run(rank):
        team = Team([0, 1, 2], 60.0, torch.device("cpu"))
        team._connect(torch.device("cpu"))
        return len(given_back)

    assert run_distributed(run, 3) == [1, 1, 1]
