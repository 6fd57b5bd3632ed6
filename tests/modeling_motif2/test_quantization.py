"""8-bit and 4-bit loading: projections are quantised; PolyNorm, norms and lambda stay in float32."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert

from tests.modeling_motif2.builders import random_ids, small_model

IN_FLOAT32 = ("lambda_", "subln", "act_fn", "layernorm", "model.norm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    model = small_model(attention="sdpa", hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1)
    model.save_pretrained(folder)
    return folder, model


def check(model, reference, is_quantised, tolerance):
    """What is quantised, what is float32, and that logits and generation stay sane."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in IN_FLOAT32):
            assert parameter.dtype == torch.float32, name
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in PROJECTIONS:
            assert is_quantised(module), name
    assert not is_quantised(model.lm_head)
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = reference(ids).logits
        error = (model(ids).logits.float() - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 15)


def test_what_a_quantiser_leaves_alone_by_default():
    """Without any package: transformers skips the head, and only linear layers are ever converted."""
    model = small_model()
    assert "lm_head" in get_keys_to_not_convert(model)
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == {*PROJECTIONS, "lm_head"}
    plan = model._get_dtype_plan(torch.bfloat16)
    in_float32 = {name for name, _ in model.named_parameters() if any(part in name for part in IN_FLOAT32)}
    assert {name for name, _ in model.named_parameters() if any(key in name.split(".") for key in plan)} == in_float32


@needs_torchao
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.1), (4, 0.5)])
def test_torchao(saved, tmp_path, bits, tolerance):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    folder, reference = saved
    kind = (
        Int8WeightOnlyConfig()
        if bits == 8
        else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=TorchAoConfig(kind), attn_implementation="sdpa"
    )
    check(model, reference, lambda module: type(module.weight.data) is not torch.Tensor, tolerance)


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.2), (4, 0.5)])
def test_bitsandbytes(saved, bits, tolerance):
    import bitsandbytes

    folder, reference = saved
    config = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True)
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, attn_implementation="sdpa", device_map="cpu"
    )
    check(model, reference, lambda module: isinstance(module, kind), tolerance)
