"""A whole model whose MLPs stay split over two ranks, against the same model on one."""

import copy

import kernels
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import kernels_hub
from kernels_hub.tensor_parallel import split_mlp
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.distributed import run_distributed


def _model(intermediate_size: int = 48) -> Motif2ForCausalLM:
    torch.manual_seed(3)
    config = Motif2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=4,
        num_noise_heads=2,
        head_dim=8,
    )
    config.base_model_tp_plan = split_mlp(config.base_model_tp_plan)
    return Motif2ForCausalLM(config).double()


def _loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.arange(24).reshape(2, 12) * 7 % 64
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return loss.detach(), whole


@pytest.mark.distributed
def test_split_mlps_give_the_loss_and_gradients_of_one_rank():
    model = _model()
    want_loss, want = _loss_and_gradients(copy.deepcopy(model))
    widths = []

    def on_rank(rank):
        split = apply_tensor_parallelism(model, init_device_mesh("cpu", (2,)))
        mlp = split.model.layers[1].mlp
        mlp.down_proj.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[-1]))
        with pytest.raises(ValueError, match="over 2 ranks"):
            kernels_hub.use_polynorm(split, "local")
        return *_loss_and_gradients(split), widths, mlp.act_fn.reduces_over_ranks

    for loss, gradients, seen, ranks in run_distributed(on_rank, 2):
        assert (seen, ranks) == ([24], 2)
        torch.testing.assert_close(loss, want_loss)
        assert gradients.keys() == want.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.distributed
def test_a_split_model_that_was_kernelized_is_refused_instead_of_being_wrong():
    model = _model()

    def on_rank(rank):
        split = apply_tensor_parallelism(model, init_device_mesh("cpu", (2,)))
        kernels.kernelize(split, mode=kernels.Mode.INFERENCE, device="cpu")
        with pytest.raises(RuntimeError, match=r"replaced \(by kernelize"):
            split(torch.arange(8)[None])

    run_distributed(on_rank, 2)


@pytest.mark.distributed
def test_features_that_do_not_split_evenly_are_refused():
    model = _model(intermediate_size=49)

    def on_rank(rank):
        split = apply_tensor_parallelism(model, init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match="of 49 features"):
            split(torch.arange(8)[None])

    run_distributed(on_rank, 2)


def test_a_plan_without_the_mlp_is_refused():
    with pytest.raises(ValueError, match=r"no mlp\.gate_proj"):
        split_mlp({"lm_head": "colwise_rep"})
