"""LoRA and DoRA on every projection, merging, and adapters saved by themselves."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modeling_motif2.diagnostics import attention_modules, track_max_logits
from tests.modeling_motif2.builders import random_ids, small_model, with_kernel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(dora: bool = False, **overrides):
    """A model with an adapter whose weights are not zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(small_model(attention="sdpa", **overrides), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_alone_and_merge_exactly(dora):
    model = adapted(dora, dtype=torch.float64)
    wrapped = {name.rsplit(".lora_A", 1)[0].rsplit(".", 1)[1] for name, _ in model.named_modules() if "lora_A" in name}
    assert wrapped == set(PROJECTIONS)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        expected, plain = model(ids).logits, model.get_base_model()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected)
        assert (small_model(attention="sdpa", dtype=torch.float64)(ids).logits - expected).abs().max() > 0.1
    assert merged.state_dict().keys() == small_model().state_dict().keys()
    assert type(merged) is type(plain)


def test_an_adapter_is_saved_and_put_on_a_fresh_model(tmp_path):
    model = adapted()
    small_model(attention="sdpa").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="sdpa")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        generated = again.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected)


def test_a_merged_model_is_saved_for_the_hub(tmp_path):
    model = adapted()
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = model(ids).logits
        model.merge_and_unload().save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_and_tracking_work_through_an_adapter():
    model = adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    track_max_logits(model)
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(module.max_logits).all() for module in attention_modules(model))


def test_a_tuned_norm_is_not_passed_over_by_the_attention_kernel():
    config = LNTuningConfig(target_modules=["subln"], task_type="CAUSAL_LM")
    plain = get_peft_model(small_model(attention="sdpa", dtype=torch.float64, ratio=3), config)
    tuned = get_peft_model(with_kernel(), config)
    ids, gradients = random_ids(2, 9), []
    for model in (plain, tuned):
        for parameter in (trained := [each for each in model.parameters() if each.requires_grad]):
            parameter.data += torch.linspace(0, 1, len(parameter))
        gradients.append(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained))
    torch.testing.assert_close(*gradients)


def test_a_prefix_is_tuned_through_the_cache():
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(small_model(attention="sdpa"), config)
    ids = random_ids(2, 6)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
