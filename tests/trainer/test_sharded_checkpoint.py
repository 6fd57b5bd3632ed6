"""Checkpoints of a model that FSDP2 shards: written by some ranks, read by others."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import trainer.checkpoint
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.distributed import run_distributed
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import complete_checkpoints, write_synced
from trainer.errors import CheckpointError
from trainer.optim import build_muon_clip

TOKENS = torch.arange(24).view(2, 12) % 40


def build(num_ranks: int):
    """A small model, sharded over all ranks when there are several, and its optimizer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    config = Motif2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=4,
        num_noise_heads=2,
        head_dim=8,
    )
    model = Motif2ForCausalLM(config)
    if num_ranks > 1:
        mesh = init_device_mesh("cpu", (num_ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, build_muon_clip(model, lr=0.02)


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def save_after_three_steps(rank: int, num_ranks: int, folder) -> None:
    model, optimizer = build(num_ranks)
    train(model, optimizer, 3)
    checkpoints = Checkpoints(folder, Accelerator(cpu=True), keep_last=1, asynchronous=True)
    checkpoints.save(model, optimizer, {"step": 3, "loader": {"pieces": torch.arange(5)}})
    train(model, optimizer, 1)  # while it is being written
    checkpoints.wait()
    checkpoints.close()


def load_and_go_on(rank: int, num_ranks: int, folder) -> dict[str, torch.Tensor]:
    model, optimizer = build(num_ranks)
    train(model, optimizer, 1)  # what was there before must not matter
    checkpoints = Checkpoints(folder, Accelerator(cpu=True), keep_last=1)
    state = checkpoints.load(checkpoints.latest(), model, optimizer)
    assert state["step"] == 3
    assert torch.equal(state["loader"]["pieces"], torch.arange(5))
    train(model, optimizer, 2)
    return weights(model)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("writers", "readers"),
    [pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow), (2, 3)],
)
def test_any_number_of_ranks_goes_on_from_a_sharded_checkpoint(tmp_path, writers, readers):
    model, optimizer = build(1)
    train(model, optimizer, 5)
    expected = weights(model)
    run_distributed(save_after_three_steps, writers, writers, tmp_path)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000003"]
    results = run_distributed(load_and_go_on, readers, readers, tmp_path)
    for result in results:
        for name, weight in expected.items():
            torch.testing.assert_close(result[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.distributed
def test_the_same_ranks_go_on_bit_for_bit(tmp_path):
    def undisturbed(rank):
        model, optimizer = build(2)
        train(model, optimizer, 5)
        return weights(model)

    expected = run_distributed(undisturbed, 2)
    run_distributed(save_after_three_steps, 2, 2, tmp_path)
    results = run_distributed(load_and_go_on, 2, 2, tmp_path)
    for result, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(result[name], wanted[name]) for name in wanted)


@pytest.mark.distributed
def test_every_rank_writes_and_checks_its_own_files(tmp_path):
    run_distributed(save_after_three_steps, 2, 2, tmp_path)
    folder = tmp_path / "step_00000003"
    assert {"__0_0.distcp", "__1_0.distcp", "random_0.pt", "random_1.pt", "checksums.json"} <= {
        p.name for p in folder.iterdir()
    }
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(RuntimeError, match=r"__1_0\.distcp is lost"):
        run_distributed(load_and_go_on, 2, 2, tmp_path)


def save_while_one_rank_has_no_room(rank: int, folder, asynchronous: bool) -> tuple[str, list[str]]:
    model, optimizer = build(2)
    train(model, optimizer, 1)
    checkpoints = Checkpoints(folder, Accelerator(cpu=True), keep_last=2, asynchronous=asynchronous)
    save_and_wait(checkpoints, model, optimizer, 1)

    def full(path, content):
        if rank == 1:
            raise OSError(28, "No space left on device")
        write_synced(path, content)

    trainer.checkpoint.write_synced = full  # this process is the rank's own
    with pytest.raises(CheckpointError) as caught:
        save_and_wait(checkpoints, model, optimizer, 2)
    trainer.checkpoint.write_synced = write_synced
    left = [path.name for path in folder.iterdir()]
    torch.distributed.barrier()
    save_and_wait(checkpoints, model, optimizer, 3)
    checkpoints.close()
    return str(caught.value), left


def save_and_wait(checkpoints, model, optimizer, step: int) -> None:
    checkpoints.save(model, optimizer, {"step": step})
    checkpoints.wait()


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_all_ranks_give_up_a_checkpoint_that_one_cannot_write(tmp_path, asynchronous):
    results = run_distributed(save_while_one_rank_has_no_room, 2, tmp_path, asynchronous)
    for (message, left), blamed in zip(results, ("rank 1: [Errno 28]", "[Errno 28]"), strict=True):
        assert f"{blamed} No space left on device; the last complete one is {tmp_path}/step_00000001" in message
        assert "step_00000001" in left
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
