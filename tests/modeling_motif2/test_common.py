"""What transformers checks on its own decoders, for ours: outputs, ties, checkpointing, loading, resizing, heads."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_motif2 import (
    Motif2ForCausalLM,
    Motif2ForQuestionAnswering,
    Motif2ForSequenceClassification,
    Motif2ForTokenClassification,
    Motif2Model,
)
from tests.modeling_motif2.builders import VOCAB_SIZE, random_ids, small_config, small_model

IN_FLOAT32 = ("lambda_", "subln", "act_fn", "layernorm", "model.norm")


def test_published_initialisation():
    model = Motif2ForCausalLM(small_config(hidden_size=128, head_dim=64, initializer_range=0.02, lambda_std_dev=0.1))
    lambdas = []
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            lambdas.append(parameter.detach())
        elif name.endswith("act_fn.weight"):
            assert torch.equal(parameter, torch.full((3,), 1 / 3))
        elif name.endswith("act_fn.bias"):
            assert torch.equal(parameter, torch.zeros(1))
        elif "norm" in name or "subln" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.detach().std() == pytest.approx(0.02, rel=0.1)
            assert abs(parameter.mean()) < 0.002
    assert torch.cat(lambdas).std() == pytest.approx(0.1, rel=0.1)


def test_a_model_built_on_meta_and_drawn_later_starts_the_same_way(tmp_path):
    small_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = torch.nn.Module.state_dict(small_model())
    kept = {name: tensor for name, tensor in weights.items() if "lambda_q1" not in name and "act_fn" not in name}
    model = Motif2ForCausalLM.from_pretrained(None, config=small_config(), state_dict=kept, strict=False)
    for layer in model.model.layers:
        assert 0.1 < layer.self_attn.lambda_q1.std() < 1.5
        assert torch.equal(layer.mlp.act_fn.weight, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_gives_the_same_logits(tmp_path, tied):
    model = small_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = random_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    saved = {key: value for key, value in again.config.to_dict().items() if not key.startswith("_")}
    same = {"transformers_version", "dtype", "architectures", "auto_map"}
    original = model.config.to_dict()
    assert {key: value for key, value in saved.items() if key not in same} == {
        key: original[key] for key in saved if key not in same
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_keeps_norms_polynorm_and_lambda_wide(tmp_path, dtype):
    model = small_model()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in half.named_parameters():
        wide = any(part in name for part in IN_FLOAT32)
        assert parameter.dtype == (torch.float32 if wide else dtype), name
    ids = random_ids(1, 8)
    with torch.no_grad():
        logits = half(ids).logits
        assert logits.dtype == dtype
        error = (logits.float() - model(ids).logits).abs().max() / model(ids).logits.abs().max()
    assert error < 0.2
    weight = half.model.layers[0].self_attn
    assert torch.equal(weight.lambda_value(), model.model.layers[0].self_attn.lambda_value())


def test_logits_to_keep_and_inputs_embeds():
    model = small_model()
    ids = random_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
        as_tuple = model(ids, return_dict=False)
    torch.testing.assert_close(as_tuple[0], logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_the_loss_is_the_mean_over_labelled_tokens():
    model = small_model()
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_every_parameter_learns_and_a_batch_is_overfitted():
    model = small_model(attention="sdpa").train()
    ids = random_ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    plain, saved = (small_model(attention="sdpa").train() for _ in range(2))
    saved.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert saved.is_gradient_checkpointing
    if reentrant:
        saved.enable_input_require_grads()
    ids = random_ids(2, 10)
    for model in (plain, saved):
        model(ids, labels=ids).loss.backward()
    for mine, theirs in zip(saved.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_left_and_right_padding_change_no_logit():
    model = small_model(attention="sdpa", dtype=torch.float64)
    row = random_ids(1, 7)
    pad = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = model(row).logits
        left = model(torch.cat([pad, row], 1), attention_mask=torch.tensor([[0] * 4 + [1] * 7])).logits[:, 4:]
        right = model(torch.cat([row, pad], 1), attention_mask=torch.tensor([[1] * 7 + [0] * 4])).logits[:, :7]
    # RoPE keeps distances: positions shifted by left padding give the same map up to float32 angles.
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right, expected)


def test_no_token_sees_a_later_one():
    model = small_model(attention="sdpa")
    ids = random_ids(1, 9)
    changed = ids.clone()
    changed[:, 6:] = random_ids(1, 3, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :6], model(changed).logits[:, :6])
        assert (model(ids).logits[:, 6:] - model(changed).logits[:, 6:]).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_be_resized(tied):
    model = small_model(tie_word_embeddings=tied)
    ids = random_ids(1, 6)
    with torch.no_grad():
        expected = model(ids).logits
        model.resize_token_embeddings(VOCAB_SIZE + 7, mean_resizing=False)
        assert model.config.vocab_size == VOCAB_SIZE + 7
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        logits = model(ids).logits
    assert logits.shape[-1] == VOCAB_SIZE + 7
    torch.testing.assert_close(logits[..., :VOCAB_SIZE], expected)
    assert len(model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)[0]) == 8
    with torch.no_grad():
        model.resize_token_embeddings(40)
        assert model(ids % 40).logits.shape[-1] == 40


def test_end_of_text_is_trained_although_it_is_also_padding():
    model = small_model(pad_token_id=2, eos_token_id=2)
    assert model.model.embed_tokens.padding_idx is None
    ids = torch.tensor([[5, 2, 9, 11]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[2].abs().sum() > 0


def test_copies_share_nothing():
    model = small_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.lambda_q1.add_(1)
    assert not torch.equal(
        twin.model.layers[0].self_attn.lambda_value(), model.model.layers[0].self_attn.lambda_value()
    )


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_sequence_classification_reads_the_last_real_token(pad_token_id):
    config = small_config(pad_token_id=pad_token_id)
    config.num_labels = 4
    model = AutoModelForSequenceClassification.from_config(config).eval()
    row = random_ids(1, 6)
    with torch.no_grad():
        expected = model.score(model.model(row).last_hidden_state[:, -1])
        torch.testing.assert_close(model(row).logits, expected)
        if pad_token_id is not None:
            padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], 1)
            mask = (padded != 0).long()
            torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)
    loss = model(row, labels=torch.tensor([2])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, torch.tensor([2])))


def test_token_classification_and_question_answering(tmp_path):
    config = small_config()
    config.num_labels = 5
    ids = random_ids(2, 7)
    tokens = AutoModelForTokenClassification.from_config(config).eval()
    assert tokens(ids).logits.shape == (2, 7, 5)
    assert torch.isfinite(tokens(ids, labels=ids % 5).loss)
    answers = AutoModelForQuestionAnswering.from_config(config).eval()
    out = answers(ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 3]))
    assert (out.start_logits.shape, out.end_logits.shape) == ((2, 7), (2, 7))
    assert torch.isfinite(out.loss)
    answers.save_pretrained(tmp_path)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).start_logits, answers(ids).start_logits)


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_heads_have_as_many_outputs_as_labels_and_the_dropout_asked_for(head):
    config = small_config(classifier_dropout=0.3)
    config.num_labels = 5
    model = head.from_config(config)
    assert model.score.out_features == model.num_labels == 5
    assert getattr(model, "dropout", torch.nn.Dropout(0.3)).p == 0.3


@pytest.mark.parametrize(
    "head", [Motif2ForSequenceClassification, Motif2ForTokenClassification, Motif2ForQuestionAnswering]
)
def test_heads_are_built_without_asking_the_auto_classes(monkeypatch, head):
    """Remote code is not registered with them."""
    monkeypatch.setattr(AutoModel, "from_config", None)
    assert type(head(small_config()).model) is Motif2Model


def test_a_task_model_is_built_on_a_language_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)
    backbone = Motif2Model.from_pretrained(tmp_path)
    assert torch.equal(backbone.norm.weight, model.model.norm.weight)


def test_layers_can_lie_on_several_devices(tmp_path):
    model = small_model(attention="sdpa")
    model.save_pretrained(tmp_path)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    ids = random_ids(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(split(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
