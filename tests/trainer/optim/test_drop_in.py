"""MuonClip in plain PyTorch, accelerate and transformers' Trainer, and the maxima that QK-clip reads of the model."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from modeling_motif2.diagnostics import track_max_logits
from tests.distributed import run_distributed
from trainer.optim import MuonClip, MuonClipFactory, ParallelMuonClip, build_muon_clip


def tiny_model(**overrides) -> Motif2ForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 10,
        "num_key_value_heads": 4,
        "num_noise_heads": 2,
        "head_dim": 8,
    }
    return Motif2ForCausalLM(Motif2Config(**settings | overrides))


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 64, (count, 12), generator=torch.Generator().manual_seed(1))


def test_build_groups_by_name_and_tracks_maxima():
    model = tiny_model()
    optimizer = build_muon_clip(model, lr=0.01, adamw_lr=0.002, learning_rates={"head": 0.005})
    rates = {group["group_name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {
        "matrices": 0.01,
        "lambda": 0.002,
        "polynorm": 0.002,
        "norms": 0.002,
        "embeddings": 0.002,
        "head": 0.005,
    }
    assert len(optimizer.attentions) == 2
    assert optimizer.param_groups[0]["names"][0] == "model.layers.0.self_attn.q_proj.weight"
    assert optimizer.clip_report()["max_logit"] == -math.inf
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw"})
    assert optimizer.param_groups[-1]["lr"] == 0.002


def test_a_refusal_leaves_the_model_as_it_was():
    model = tiny_model()
    attentions = [layer.self_attn for layer in model.model.layers]
    with pytest.raises(ValueError, match="chunk_size is 0"):
        build_muon_clip(model, lr=0.01, chunk_size=0)
    assert all(attention.max_logits is None and attention.max_logits_gate is None for attention in attentions)
    build_muon_clip(model, lr=0.01, qk_clip_threshold=100.0)
    with pytest.raises(ValueError, match="momentum is 2"):
        build_muon_clip(model, lr=0.01, qk_clip_threshold=50.0, momentum=2)
    assert all(attention.max_logits is not None and attention.max_logits_gate == 100.0 for attention in attentions)
    with pytest.raises(ValueError, match="attentions are found in the model"):
        build_muon_clip(model, lr=0.01, attentions=[])


def test_training_lowers_the_loss_and_clips():
    model, ids = tiny_model(), tokens()
    optimizer = build_muon_clip(model, lr=0.01, qk_clip_threshold=0.05)
    losses, clipped = [], []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clipped.append(optimizer.clip_report()["clipped_heads"])
    assert losses[-1] < 0.8 * losses[0]
    assert max(clipped) > 0
    assert optimizer.clip_report()["max_logit"] < 0.5


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_evaluation_and_generation_do_not_clip(training):
    model, ids = tiny_model(initializer_range=0.3).train(training), tokens()
    optimizer = build_muon_clip(model, lr=0.01, weight_decay=0.0, qk_clip_threshold=0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.clip_report()["clipped_heads"] == 0
    assert all(map(torch.equal, model.parameters(), before))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # fine-tuning in eval mode clips too
    optimizer.step()
    assert optimizer.clip_report()["clipped_heads"] > 0


def test_qk_clip_can_be_switched_off():
    model = tiny_model()
    optimizer = build_muon_clip(model, lr=0.01, qk_clip_threshold=None)
    assert optimizer.attentions == []
    assert all(layer.self_attn.max_logits is None for layer in model.model.layers)


def test_layers_with_frozen_queries_are_not_clipped():
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    assert build_muon_clip(model, lr=0.01).attentions == [model.model.layers[1].self_attn]


def exact_maxima(model, batches) -> list[torch.Tensor]:
    """Largest scaled logit of each query head over visible positions, from attention's own inputs."""
    maxima = [torch.full((10,), -math.inf) for _ in model.model.layers]
    captured = {}

    def capture(layer, name):
        return lambda module, inputs, output: captured.__setitem__((layer, name), output)

    hooks = [
        getattr(block.self_attn, name).register_forward_hook(capture(layer, name))
        for layer, block in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    for ids in batches:
        model.model(input_ids=ids, use_cache=False)
        for layer in range(len(maxima)):
            query = rotate(captured[layer, "q_proj"].unflatten(-1, (10, 8)), model)  # (B, T, H, D)
            key = rotate(captured[layer, "k_proj"].unflatten(-1, (4, 8)), model)
            key_of_query = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2, 3])
            logits = torch.einsum("bthd,bshd->bhts", query, key[:, :, key_of_query]) / math.sqrt(8)
            visible = torch.ones(12, 12).tril().bool()
            largest = logits.masked_fill(~visible, -math.inf).amax((0, 2, 3))
            maxima[layer] = torch.maximum(maxima[layer], largest)
    for hook in hooks:
        hook.remove()
    return maxima


def rotate(heads: torch.Tensor, model) -> torch.Tensor:
    """Rotary positions 0 … T-1, written out: halves of a head form the pairs."""
    theta = model.config.rope_parameters["rope_theta"]
    angles = torch.arange(heads.shape[1])[:, None] * theta ** -(torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, D / 2)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_maxima_are_exact_under_checkpointing_and_accumulation(backend, checkpointing):
    model = tiny_model(attn_implementation=backend, initializer_range=0.3)
    batches = tokens(6).chunk(3)
    with torch.no_grad():
        expected = exact_maxima(model, batches)
    build_muon_clip(model, lr=0.01)
    track_max_logits(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for layer, maxima in zip(model.model.layers, expected, strict=True):
        torch.testing.assert_close(layer.self_attn.max_logits, maxima, rtol=1e-4, atol=1e-5)


def test_trainer_takes_the_factory(tmp_path):
    model = tiny_model()
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], save_steps=2, use_cpu=True, logging_steps=1
    )
    options = {"lr": 0.01, "adamw_lr": 0.001, "qk_clip_threshold": 5.0}
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(MuonClipFactory, options))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, ParallelMuonClip)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    assert trainer.optimizer.optimizer.clip_report()["max_logit"] > -math.inf
    other = tiny_model(initializer_range=0.5)
    resumed = Trainer(other, arguments, train_dataset=data, optimizer_cls_and_kwargs=(MuonClipFactory, options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_accelerate_prepares_model_and_optimizer_together():
    ours, plain = tiny_model(), tiny_model()
    accelerator = Accelerator(cpu=True)
    optimizer = build_muon_clip(ours, lr=0.01)
    peer = build_muon_clip(plain, lr=0.01)
    ours, optimizer = accelerator.prepare(ours, optimizer)
    for model, stepper in ((ours, optimizer), (plain, peer)):
        for ids in tokens(4).chunk(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss) if stepper is optimizer else loss.backward()
            stepper.step()
            stepper.zero_grad()
    for ours_parameter, parameter in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours_parameter, parameter)


def accelerated(rank):
    """accelerate's FSDP2, which swaps the optimizer's parameters; it leaves CPUs out unless told otherwise."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = tiny_model()
    optimizer = build_muon_clip(model, lr=0.01, qk_clip_threshold=0.03, method="classic")
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    for _ in range(3):
        ids = tokens(4).chunk(2)[rank]
        accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.optimizer.clip_report()["clipped_heads"] > 0
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


@pytest.mark.distributed
def test_accelerate_with_fsdp_follows_the_reference_on_the_whole_batch():
    model, ids = tiny_model(), tokens(4)
    attentions = [layer.self_attn for layer in model.model.layers]
    groups = build_muon_clip(model, lr=0.01).param_groups
    with pytest.raises(ValueError, match=r"max_logits_gate 100.0 is above qk_clip_threshold 0\.03"):
        MuonClip(groups, lr=0.01, qk_clip_threshold=0.03, attentions=attentions)
    track_max_logits(model)
    optimizer = MuonClip(groups, lr=0.01, qk_clip_threshold=0.03, attentions=attentions)
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in run_distributed(accelerated, 2):
        for (name, parameter), sharded in zip(model.named_parameters(), result, strict=True):
            torch.testing.assert_close(sharded, parameter.detach(), rtol=0, atol=1e-4, msg=name)


@pytest.mark.distributed
def test_flat_parameters_of_fsdp_1_are_refused():
    def run(rank):
        model = FullyShardedDataParallel(tiny_model(), use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="FSDP 1"):
            build_muon_clip(model, lr=0.01)
        model = tiny_model()
        optimizer = build_muon_clip(model, lr=0.01)
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="FSDP 1"):
            optimizer.step()

    run_distributed(run, 2)


def test_a_model_without_attention_needs_no_clip():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = build_muon_clip(model, lr=0.01)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert optimizer.clip_report()["clipped_heads"] == 0
