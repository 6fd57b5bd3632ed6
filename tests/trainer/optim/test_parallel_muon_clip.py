"""Parallel MuonClip equals the reference in every layout, and itself bit for bit on any number of ranks."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.distributed import run_distributed
from tests.trainer.optim.helpers import Bag, attention_of, distribute, full_tensors, groups_of, shard_fully, train
from trainer.optim import MuonClip, ParallelMuonClip
from trainer.optim.layout import Block
from trainer.optim.muon_clip_reference import newton_schulz_reference, update_scale
from trainer.optim.qk_clip import _first_local_head, _scale_rows

OPTIONS = {"lr": 0.1, "qk_clip_rule": "official", "method": "classic"}


def reference_result(dtype, rule="official") -> dict[str, torch.Tensor]:
    bag = Bag(dtype)
    attention = attention_of(bag)
    return train(bag, MuonClip(groups_of(bag), lr=0.1, qk_clip_rule=rule, attentions=[attention]), attention)


def single_result(dtype, device="cpu", **options) -> dict[str, torch.Tensor]:
    bag = Bag(dtype).to(device)
    attention = attention_of(bag)
    result = train(bag, ParallelMuonClip(groups_of(bag), **OPTIONS | options, attentions=[attention]), attention)
    return {name: value.cpu() for name, value in result.items()}


def plain(bag, world_size):
    """Copies on all ranks, as under DDP."""


def fsdp(bag, world_size):
    shard_fully(bag, init_device_mesh("cpu", (world_size,)))


def fsdp_on(rank, world_size, device, method, copy_engines=False) -> dict[str, torch.Tensor]:
    """The whole of a rank's work on an accelerator."""
    torch.cuda.set_device(rank)
    bag = Bag(torch.float32).to(device)
    shard_fully(bag, init_device_mesh(device, (world_size,)))
    attention = attention_of(bag, rank, world_size)
    options = OPTIONS | {"method": method, "copy_engines": copy_engines}
    optimizer = ParallelMuonClip(groups_of(bag), **options, attentions=[attention])
    return {name: value.cpu() for name, value in train(bag, optimizer, attention).items()}


def fsdp_columns(bag, world_size):
    """Columns where they divide evenly, as FSDP2 demands; all other dimensions may be uneven."""

    def placement(parameter):
        return Shard(1 if parameter.ndim == 2 and parameter.shape[1] % world_size == 0 else 0)

    shard_fully(bag, init_device_mesh("cpu", (world_size,)), shard_placement_fn=placement)


def uneven_columns(bag, world_size):
    distribute(bag, init_device_mesh("cpu", (world_size,)), lambda p: [Shard(p.ndim - 1)])


def hsdp(bag, world_size):
    shard_fully(bag, init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicas", "shards")))


def tensor_parallel(bag, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    distribute(bag, mesh, lambda p: [Shard(1 if p.shape == (6, 16) else 0)])


def fsdp_tensor_parallel(bag, world_size):
    """FSDP2 over tensor parallelism, by rows for some and by columns for others; FSDP2 wants even shards here."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    by_rows = {(16, 6), (12, 5)}
    distribute(bag, mesh["tp"], lambda p: [Shard(0) if tuple(p.shape) in by_rows else Replicate()])
    del bag.odd, bag.short
    bag.q_proj = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(
        bag.q_proj.full_tensor().detach(), mesh["tp"], [Shard(1)]))  # fmt: skip
    shard_fully(bag, mesh["dp"])


LAYOUTS = [plain, fsdp, fsdp_columns, uneven_columns, hsdp, tensor_parallel]


def joined_result(rank: int, world_size: int, placements: tuple, chunk_size: int | None) -> tuple[list, list[int]]:
    """Two steps on gates and downs; the weights, and how many parts each of this rank's batches had."""
    mesh = init_device_mesh("cpu", (world_size,))
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in ((16, 6), (16, 6), (6, 16), (6, 16), (7, 5)):
        weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        parameters.append(torch.nn.Parameter(distribute_tensor(weight, mesh, placements)))
        parameters[-1].grad = distribute_tensor(gradient, mesh, placements)
    optimizer = ParallelMuonClip(parameters, lr=0.1, chunk_size=chunk_size)
    parts, orthogonalise = [], optimizer.orthogonalise.kernels.newton_schulz

    def counted(batch, *arguments, **options):
        parts.append(len(batch))
        return orthogonalise(batch, *arguments, **options)

    optimizer.orthogonalise.kernels = SimpleNamespace(**vars(optimizer.orthogonalise.kernels))
    optimizer.orthogonalise.kernels.newton_schulz = counted
    for _ in range(2):
        optimizer.step()
    return [parameter.detach().full_tensor() for parameter in parameters], parts


def joined_results(rank: int, world_size: int) -> list[tuple[list, list[int]]]:
    layouts = ((Shard(0),), (Shard(1),), (Replicate(),))
    return [joined_result(rank, world_size, layout, size) for layout in layouts for size in (2, None)]


def results_by_layout(rank, world_size, layouts, dtype, options):
    results = {}
    for layout in layouts:
        bag = Bag(dtype)
        layout(bag, world_size)
        attention = attention_of(bag, rank, world_size)
        optimizer = ParallelMuonClip(groups_of(bag), **OPTIONS | options, attentions=[attention])
        results[layout.__name__] = train(bag, optimizer, attention)
    return results


@functools.cache
def distributed_results(world_size: int, dtype: torch.dtype) -> list:
    return run_distributed(results_by_layout, world_size, world_size, LAYOUTS, dtype, {})


def assert_all_close(actual, expected, tolerance):
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_gate_and_down_in_one_batch_have_the_bits_they_have_alone():
    expected, parts = run_distributed(joined_result, 1, 1, (Replicate(),), 1)[0]
    assert set(parts) == {1}
    for results in run_distributed(joined_results, 2, 2):
        for weights, parts in results:
            assert 2 in parts, "no batch of this rank held both orientations"
            assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rule", ["official", "q_only", "compensated"])
@pytest.mark.parametrize("method", ["classic", "gram"])
def test_one_rank_equals_the_reference(dtype, tolerance, rule, method):
    result = single_result(dtype, qk_clip_rule=rule, method=method)
    assert_all_close(result, reference_result(dtype, rule), tolerance)


def test_coefficients_can_be_chosen():
    jordan = ((3.4445, -4.7750, 2.0315),) * 5  # Source: Keller Jordan, Muon (2024)
    start, gradient = full_tensors(0)["gate"], full_tensors(1)["gate"]
    for coefficients in ("jordan", jordan):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient
        ParallelMuonClip([weight], lr=1.0, weight_decay=0.0, coefficients=coefficients).step()
        update = update_scale(16, 6) * newton_schulz_reference(1.95 * gradient, jordan)  # Nesterov on the first step
        torch.testing.assert_close(weight.detach(), start - update, rtol=0, atol=1e-10)


def test_the_clip_is_part_of_what_is_compared():
    unclipped = single_result(torch.float64, qk_clip_threshold=1e9)
    clipped = single_result(torch.float64)
    assert not torch.allclose(clipped["q_proj"], unclipped["q_proj"], rtol=0.1)
    assert not torch.allclose(clipped["k_proj"], unclipped["k_proj"], rtol=0.1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [
        (2, torch.float32),
        pytest.param(4, torch.float64, marks=pytest.mark.slow),
        pytest.param(2, torch.float64, marks=pytest.mark.slow),
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_every_layout_is_bitwise_equal_to_one_rank(world_size, dtype):
    expected = single_result(dtype)
    for results in distributed_results(world_size, dtype):
        for layout, result in results.items():
            for name, value in result.items():
                assert torch.equal(value, expected[name]), f"{layout} on {world_size} ranks differs in {name}"


@pytest.mark.distributed
def test_switches_do_not_change_a_bit():
    expected = single_result(torch.float32)
    switches = [
        {"chunk_size": 1},
        {"chunk_size": None, "pipelined": False},
        {"chunk_size": 1, "balanced": False},
        {"mode": "distributed"},
        {"max_replicas": 1},
    ]

    def run(rank):
        return [results_by_layout(rank, 4, [fsdp, hsdp, plain], torch.float32, options) for options in switches]

    for results in run_distributed(run, 4):
        for options, by_layout in zip(switches, results, strict=True):
            for layout, result in by_layout.items():
                for name, value in result.items():
                    assert torch.equal(value, expected[name]), f"{layout} with {options} differs in {name}"


@pytest.mark.distributed
def test_every_clip_rule_is_bitwise_equal_to_one_rank():
    rules = ("q_only", "compensated")
    expected = {rule: single_result(torch.float64, qk_clip_rule=rule) for rule in rules}

    def run(rank):
        return {rule: results_by_layout(rank, 2, [fsdp], torch.float64, {"qk_clip_rule": rule}) for rule in rules}

    for results in run_distributed(run, 2):
        for rule, by_layout in results.items():
            for name, value in by_layout["fsdp"].items():
                assert torch.equal(value, expected[rule][name]), f"{rule} differs in {name}"


def strided_run(rank):
    bag = Bag()
    fsdp_tensor_parallel(bag, 4)
    placements = {name: parameter.placements for name, parameter in bag.named_parameters()}
    attention = attention_of(bag, rank, 4)
    optimizer = ParallelMuonClip(groups_of(bag), **OPTIONS, attentions=[attention])
    return placements, train(bag, optimizer, attention)


@pytest.mark.distributed
def test_fsdp_over_tensor_parallelism_is_bitwise_equal_to_one_rank():
    expected = single_result(torch.float64)
    for placements, result in run_distributed(strided_run, 4):
        assert isinstance(placements["k_proj"][0], _StridedShard)
        assert placements["q_proj"] == (Shard(0), Shard(1))
        assert "odd" not in result
        for name, value in result.items():
            assert torch.equal(value, expected[name]), name


def heads_of_tensor_parallel_rank(rank):
    """Under tensor parallelism a module knows the maxima of its own heads only."""
    bag = Bag()
    mesh = init_device_mesh("cpu", (2,))
    distribute(bag, mesh, lambda p: [Shard(0)])
    attention = attention_of(bag)
    attention.max_logits = attention.max_logits.chunk(2)[rank].clone()
    optimizer = ParallelMuonClip(groups_of(bag), **OPTIONS, attentions=[attention])
    return train(bag, optimizer, attention), optimizer.clip_report()


@pytest.mark.distributed
def test_local_heads_of_tensor_parallelism():
    expected = single_result(torch.float64)
    for result, report in run_distributed(heads_of_tensor_parallel_rank, 2):
        assert torch.equal(result["q_proj"], expected["q_proj"])
        assert torch.equal(result["k_proj"], expected["k_proj"])
        assert (report["clipped_heads"], report["max_logit"]) == (3, 400.0)


def test_rows_in_several_runs_take_their_own_factors():
    local = torch.ones(4, 3)
    _scale_rows(local, Block(((0, 2), (4, 6)), ((0, 3),)), torch.arange(6.0))
    assert local.T.tolist() == [[0.0, 1.0, 4.0, 5.0]] * 3


@pytest.mark.distributed
def test_local_heads_are_those_of_the_tensor_parallel_axis():
    def first_head(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        placements = (_StridedShard(0, split_factor=2), Shard(0))
        return _first_local_head(DTensor.from_local(torch.zeros(6, 5), mesh, placements), 4, 8)

    assert run_distributed(first_head, 4) == [0, 4, 0, 4]
