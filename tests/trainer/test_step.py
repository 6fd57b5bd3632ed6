"""One step on several layouts of ranks: FSDP2, HSDP and tensor parallelism, by torch's own functions on gloo."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import kernels_hub
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.distributed import Collectives, run_distributed
from trainer.assemble import make_accelerator
from trainer.data.loader import Batch
from trainer.execution import compile_layers
from trainer.optim import build_muon_clip
from trainer.optim.layout import local_of
from trainer.sharding import drop_gathered_weights, gather_backwards_in_order
from trainer.step import TrainStep

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH, STEPS = 8, 16, 3
# Losses and norms of layouts differ by the order of float32 sums alone; three steps of MuonClip amplify it.
BOUND = 2e-4


def build(layout: str) -> Motif2ForCausalLM:
    """A small model, the same on all ranks, then laid out over them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    model = Motif2ForCausalLM(
        Motif2Config(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=4,
            num_noise_heads=2,
            head_dim=8,
        )
    )
    if layout == "tensor":
        return apply_tensor_parallelism(model, init_device_mesh("cpu", (2,)))
    if layout != "one":
        shape, names = {"fsdp": ((2,), ("shard",)), "hsdp": ((2, 2), ("replicate", "shard"))}[layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for part in (model.model.embed_tokens, *model.model.layers):  # as accelerate does
            fully_shard(part, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
    return model


def make_step(layout: str, micro_batch_tokens: int | None = None, **options) -> TrainStep:
    model = build(layout)
    optimizer = build_muon_clip(model, lr=0.02, adamw_lr=0.005, qk_clip_threshold=0.02)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(optimizer)
    tensor_ranks = 2 if layout == "tensor" else 1
    return TrainStep(
        accelerator, model, optimizer, ["a", "b"], 1.0, micro_batch_tokens, **options, tensor_ranks=tensor_ranks
    )


def batch(step: TrainStep, number: int) -> Batch:
    """This rank's rows of a step; each row is two packed documents."""
    ids = torch.randint(0, 48, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, 10] = -100  # the second document's first token
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]).expand(ROWS, -1)
    own = slice(step.data_rank, None, step.data_ranks)
    return Batch(
        ids[own],
        labels[own],
        positions[own],
        (torch.arange(ROWS) % 2)[own],
        weights={},
        tokens_by_domain={},
        predicted_tokens=ROWS * (LENGTH - 2),
        attention_pairs=0,
        nominal_tokens=ROWS * LENGTH,
        state={},
    )


def curve(layout: str, **options) -> list:
    step = make_step(layout, **options)
    outcomes = [step.run(batch(step, number), 1.0) for number in range(STEPS)]
    held_out = batch(step, 99)
    inputs = {name: getattr(held_out, name) for name in ("input_ids", "labels", "position_ids")}
    return [
        [o.loss, o.grad_norm, *o.loss_by_domain.values(), *o.max_logits, *o.lambdas, o.clipped_heads] for o in outcomes
    ] + [[step.evaluate([inputs] if step.data_ranks == 1 else _whole_rows(step))]]


def _whole_rows(step: TrainStep) -> list[dict]:
    """The held-out rows that one rank alone has, cut as evaluation shares batches out."""
    one = TrainStep.__new__(TrainStep)
    one.data_rank, one.data_ranks = 0, 1
    rows = batch(one, 99)
    per_rank = ROWS // step.data_ranks
    return [
        {name: getattr(rows, name)[start : start + per_rank] for name in ("input_ids", "labels", "position_ids")}
        for start in range(0, ROWS, per_rank)
    ]


def assert_same(found: list, wanted: list) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=BOUND, abs=1e-6)


@pytest.fixture(scope="module")
def alone() -> list:
    found = curve("one")
    assert all(outcome[-1] > 0 for outcome in found[:STEPS])  # some heads are clipped in each step
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "ranks"), [("fsdp", 2), ("hsdp", 4), ("tensor", 2)])
def test_every_layout_gives_the_curve_of_one_rank(alone, layout, ranks):
    for found in run_distributed(lambda rank: curve(layout), ranks):
        assert_same(found, alone)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["one", "fsdp"])
def test_chunked_loss_and_accumulation_give_the_same_curve(alone, layout):
    def run(rank=0):
        return curve(layout, loss="chunked", micro_batch_tokens=2 * LENGTH)

    for found in [run()] if layout == "one" else run_distributed(run, 2):
        assert_same(found, alone)


def test_gradients_are_those_of_the_mean_over_the_predicted_tokens():
    step = make_step("one", micro_batch_tokens=3 * LENGTH)  # micro-batches of 3, 3 and 2 rows
    rows = batch(step, 0)
    step._backward(rows)
    found = [parameter.grad for parameter in step.model.parameters()]
    step.model.zero_grad()
    logits = step.model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.labels[:, 1:].flatten()).backward()
    for gradient, parameter in zip(found, step.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_gradient_norm_is_clipped_to_the_limit(limit, monkeypatch):
    step = make_step("one")
    step = TrainStep(step.accelerator, step.model, step.optimizer, ["a", "b"], limit, None)
    losses, update, norms = step.token_losses, step.optimizer.step, []

    def token_losses(*arguments):
        tokens, counted = losses(*arguments)
        return 100 * tokens, counted

    def note():
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in step.model.parameters()]).item())
        update()

    monkeypatch.setattr(step, "token_losses", token_losses)
    monkeypatch.setattr(step.optimizer, "step", note)
    before_clipping = step.run(batch(step, 0), 1.0).grad_norm
    assert before_clipping > 10
    assert norms == pytest.approx([limit or before_clipping], rel=1e-4)


def test_the_rate_of_every_group_is_the_factor_of_its_peak():
    step = make_step("one")
    assert {group["lr"] for group in step.optimizer.param_groups} == {0.02, 0.005}
    for number, factor in enumerate((0.5, 0.25)):
        step.run(batch(step, number), factor)
        assert {group["lr"] for group in step.optimizer.param_groups} == {0.02 * factor, 0.005 * factor}


def test_the_loss_is_divided_once_whatever_the_environment_says(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    weight = torch.ones((), requires_grad=True)
    make_accelerator(make_config()).backward(8 * weight)
    assert weight.grad == 8


def test_rows_must_be_dealt_out_for_the_tensor_parallelism_of_the_launch(monkeypatch):
    step = make_step("one")
    monkeypatch.setattr(Accelerator, "parallelism_config", SimpleNamespace(tp_size=2))
    with pytest.raises(ValueError, match="launched with tp_size 2, and rows are dealt out for 1: set"):
        TrainStep(step.accelerator, step.model, step.optimizer, ["a", "b"], None, None)


@pytest.mark.distributed
def test_tensor_parallelism_refuses_a_chunked_loss():
    def run(rank):
        step = make_step("tensor", loss="chunked")
        with pytest.raises(ValueError, match="tensor parallelism splits the head's words"):
            step.run(batch(step, 0), 1.0)

    run_distributed(run, 2)


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "ranks"), [("fsdp", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_accumulation_reduces_gradients_once(layout, ranks):
    def collectives(rank, micro_batch_tokens):
        step = make_step(layout, micro_batch_tokens=micro_batch_tokens)
        rows = batch(step, 0)
        with Collectives() as seen:
            step._backward(rows)
        return seen.counts

    whole = run_distributed(collectives, ranks, None)[0]
    parts = run_distributed(collectives, ranks, LENGTH)[0]
    reductions = {name for name in whole if "reduce" in name}
    assert any("reduce_scatter" in name for name in reductions)
    assert any("allreduce" in name for name in reductions) == (layout == "hsdp")
    assert parts.keys() == whole.keys()
    assert {name: parts[name] for name in reductions} == {name: whole[name] for name in reductions}


@pytest.mark.distributed
def test_a_step_after_an_evaluation_gathers_what_any_step_does():
    """FSDP2 by itself would go on into the evaluation's weights at the end of the first backward."""

    def gathers(rank):
        step = make_step("fsdp", micro_batch_tokens=LENGTH)
        counts = []
        for evaluated in (False, True, False):
            if evaluated:
                step.evaluate(_whole_rows(step))
            with Collectives() as seen:
                step._backward(batch(step, 0))
            counts.append({name: count for name, count in seen.counts.items() if "gather" in name})
        return counts

    before, after, later = run_distributed(gathers, 2)[0]
    assert before
    assert before == after == later


@pytest.mark.distributed
def test_a_backward_gathers_no_embedding_that_is_frozen():
    def gathers(rank):
        step, counts = make_step("fsdp"), []
        for trained in (True, False):
            step.bare_model.get_input_embeddings().requires_grad_(trained)
            gather_backwards_in_order(step.bare_model)
            with Collectives() as seen:
                step._backward(batch(step, 0))
            counts.append(sum(count for name, count in seen.counts.items() if "gather" in name))
        return counts

    trained, frozen = run_distributed(gathers, 2)[0]
    assert frozen == trained - 1


@pytest.mark.distributed
def test_weights_of_a_head_that_was_never_called_are_dropped():
    """As after TRL's fused loss, where torch does not end the forward itself."""

    def gathered(rank):
        step = make_step("fsdp")
        step.evaluate(_whole_rows(step))
        model, found = step.bare_model, []
        with torch.no_grad():
            model.model(input_ids=batch(step, 0).input_ids)
        for _ in range(2):
            found.append(not isinstance(model.model.norm.weight, DTensor))
            drop_gathered_weights(model)
        step.run(batch(step, 0), 1.0)
        return found

    assert run_distributed(gathered, 2) == [[True, False]] * 2


@pytest.mark.distributed
def test_an_evaluation_sees_weights_that_changed_since_the_last_one():
    def losses(rank):
        step = make_step("fsdp")
        head = step.bare_model.lm_head.weight  # this rank's part, as the optimizer has it
        first = step.evaluate(_whole_rows(step))
        with torch.no_grad():
            head.zero_()
        return first, step.evaluate(_whole_rows(step))

    first, second = run_distributed(losses, 2)[0]
    assert abs(first - math.log(48)) > 1e-3
    assert second == pytest.approx(math.log(48), abs=1e-6)


def test_the_first_step_proves_that_the_polynorm_kernel_runs():
    step = make_step("one")
    kernels_hub.use_polynorm(step.model, "local")
    proven = TrainStep(step.accelerator, step.model, step.optimizer, ["a", "b"], None, None)
    proven.run(batch(proven, 0), 1.0)
    replaced = TrainStep(step.accelerator, step.model, step.optimizer, ["a", "b"], None, None)
    for layer in step.model.model.layers:
        layer.mlp.forward = lambda hidden, mlp=layer.mlp: mlp.down_proj(mlp.gate_proj(hidden) * mlp.up_proj(hidden))
    with pytest.raises(AssertionError, match="0 ran: something replaced the forward"):
        replaced.run(batch(replaced, 0), 1.0)


@pytest.mark.slow
def test_the_second_compiled_step_proves_that_the_polynorm_kernel_runs():
    step = make_step("one")
    kernels_hub.use_polynorm(step.model, "local")
    compile_layers(step.model, "aot_eager")
    proven = TrainStep(step.accelerator, step.model, step.optimizer, ["a", "b"], None, None)
    replaced = TrainStep(step.accelerator, step.model, step.optimizer, ["a", "b"], None, None)
    for number in range(3):
        proven.run(batch(proven, number), 1.0)
    for layer in step.model.model.layers:
        layer.mlp.forward = lambda hidden, mlp=layer.mlp: mlp.down_proj(mlp.gate_proj(hidden) * mlp.up_proj(hidden))
    replaced.run(batch(replaced, 0), 1.0)
    with pytest.raises(AssertionError, match="0 ran: something replaced the forward"):
        replaced.run(batch(replaced, 1), 1.0)


def test_attention_kernels_are_chosen_for_forward_and_backward_alike(monkeypatch):
    """A layer that is recomputed in the backward pass must meet the kernels of the forward pass."""
    inside, seen = [], []

    @contextlib.contextmanager
    def noted():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr("trainer.step.fast_attention", noted)
    step = make_step("one")
    original = step.accelerator.backward
    monkeypatch.setattr(step.accelerator, "backward", lambda loss: seen.append(bool(inside)) or original(loss))
    step.model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(bool(inside)))
    step.run(batch(step, 0), 1.0)
    rows = batch(step, 1)
    step.evaluate([{name: getattr(rows, name) for name in ("input_ids", "labels", "position_ids")}])
    assert seen == [True, True, True]
    assert inside == []


def test_evaluation_leaves_the_maximum_logits_of_training_alone():
    step = make_step("one")
    rows = batch(step, 1)
    step.evaluate([{name: getattr(rows, name) for name in ("input_ids", "labels", "position_ids")}])
    assert all(torch.isneginf(attention.max_logits).all() for attention in step.attentions)


@pytest.mark.slow
def test_step_and_optimizer_need_no_library_that_they_do_not_use():
    program = """
import sys
for name in ("trl", "datasets", "kernels", "lm_eval", "torchao", "liger_kernel"):
    sys.modules[name] = None
import trainer.step, trainer.optim, trainer.execution, trainer.flops
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr


def assert_step_is_left_out(step: TrainStep, spoilt: float) -> None:
    """A step whose losses have `spoilt` added, a constant: its gradients are finite."""
    step.run(batch(step, 0), 1.0)
    before = [local_of(parameter).detach().clone() for parameter in step.model.parameters()]
    original = step.token_losses

    def token_losses(*arguments):
        losses, counted = original(*arguments)
        return losses + spoilt, counted

    step.token_losses = token_losses
    outcome = step.run(batch(step, 1), 1.0)
    assert outcome.skipped
    assert not math.isfinite(outcome.loss)
    assert math.isfinite(outcome.grad_norm)
    assert outcome.clipped_heads == 0
    after = (local_of(parameter) for parameter in step.model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    step.token_losses = original
    next_outcome = step.run(batch(step, 1), 1.0)
    assert not next_outcome.skipped
    assert all(math.isfinite(logit) for logit in next_outcome.max_logits)


@pytest.mark.parametrize("spoilt", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_changes_no_weight_even_with_finite_gradients(spoilt):
    assert_step_is_left_out(make_step("one"), spoilt)


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_on_one_rank_stops_the_update_on_all():
    run_distributed(lambda rank: assert_step_is_left_out(make_step("fsdp"), math.inf if rank else 0.0), 2)
