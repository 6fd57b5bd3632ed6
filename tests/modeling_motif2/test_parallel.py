"""Tensor, pipeline and sharded data parallelism through transformers' plans, on gloo ranks."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_motif2.diagnostics import attention_statistics
from tests.distributed import run_distributed
from tests.modeling_motif2.builders import random_ids, small_model

pytestmark = pytest.mark.distributed


@pytest.fixture
def folder(tmp_path):
    small_model(attention="sdpa", groups=2, ratio=3, vocab_size=64).save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**options))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own, whole again where ranks held parts of it."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def outcome(model, ids):
    """Logits, and gradients by name."""
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return full(out.logits), {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def test_tensor_parallel_logits_gradients_and_generation_are_those_of_one_rank(folder):
    ids = random_ids(2, 7)
    expected_model = AutoModelForCausalLM.from_pretrained(folder)
    expected_text = expected_model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    expected = outcome(expected_model, ids)

    def rank(_):
        model = load(folder, tp_size=2)
        query = model.model.layers[0].self_attn.q_proj.weight
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        return *outcome(model, ids), tuple(query.to_local().shape), generated

    for logits, gradients, shape, generated in run_distributed(rank, 2):
        assert shape == (4 * 8, 32)
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(generated, expected_text)


def test_a_tensor_parallel_rank_records_its_own_groups(folder):
    ids = random_ids(2, 7)
    expected = attention_statistics(AutoModelForCausalLM.from_pretrained(folder), input_ids=ids)
    ranks = run_distributed(lambda _: attention_statistics(load(folder, tp_size=2), input_ids=ids), 2)
    for whole, first, second in zip(expected, *ranks, strict=True):
        assert torch.isneginf(first.max_logits[4:]).all()
        assert torch.isneginf(second.max_logits[:4]).all()
        torch.testing.assert_close(torch.maximum(first.max_logits, second.max_logits), whole.max_logits)
        torch.testing.assert_close(first.noise_norms + second.noise_norms, whole.noise_norms)
        torch.testing.assert_close(first.signal_norms + second.signal_norms, whole.signal_norms)


def test_a_cut_through_a_group_is_refused(folder):
    def rank(_):
        model = load(folder, tp_size=4)
        try:
            model(random_ids(1, 5))
        except ValueError as error:
            return str(error)

    assert all("use a number of ranks that divides 2" in message for message in run_distributed(rank, 4))


def test_a_plan_that_would_spoil_polynorm_is_refused(folder):
    def rank(_):
        plan = AutoModelForCausalLM.from_pretrained(folder).tp_plan
        plan |= {f"model.layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")}
        plan["model.layers.*.mlp.down_proj"] = "rowwise"
        model = load(folder, tp_size=2, tp_plan=plan)
        try:
            model(random_ids(1, 5))
        except ValueError as error:
            return str(error)

    assert all("PolyNorm sees 24 of 48 features" in message for message in run_distributed(rank, 2))


def test_pipeline_parallel_logits_and_generation_are_those_of_one_rank(folder):
    ids = random_ids(2, 7)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    def logits_and_text(model):
        with torch.no_grad():
            return model(ids, use_cache=False).logits, model.generate(ids, **options)

    expected = logits_and_text(AutoModelForCausalLM.from_pretrained(folder))
    for logits, text in run_distributed(lambda _: logits_and_text(load(folder, pp_size=2)), 2):
        torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(text, expected[1])


def test_sharded_logits_and_gradients_are_those_of_one_rank(folder):
    ids = random_ids(2, 7)
    expected = outcome(AutoModelForCausalLM.from_pretrained(folder), ids)

    def rank(_):
        return outcome(load(folder, fsdp_size=2), ids)

    for logits, gradients in run_distributed(rank, 2):
        torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sharded_model_saves_what_one_rank_would(folder, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    def rank(_):
        load(folder, tp_size=2).save_pretrained(tmp_path / "tp")
        return None

    run_distributed(rank, 2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "tp").state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
