"""The template writes Motif's markup, marks what the assistant writes, and generation stops where a turn ends."""

from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import is_chat_template_stop_token_trained

from sft.chat import (
    attach_chat_template,
    encode_conversations,
    render_loss_mask,
    set_stop_tokens,
    stop_token_ids,
)

TRANSCRIPTS = {
    "one turn": (
        [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}],
        "<|beginoftext|><|startofturn|><|user|>\nWhat is 1 + 1?<|endofturn|>"
        "<|startofturn|><|assistant|>\n⟦2<|endofturn|>⟧",
    ),
    "system, two turns, thinking": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "47 + 38?"},
            {"role": "assistant", "reasoning_content": "7 + 8 = 15", "content": "85"},
            {"role": "user", "content": "And 1 more?"},
            {"role": "assistant", "content": "86"},
        ],
        "<|beginoftext|><|startofturn|><|system|>\nBe brief.<|endofturn|>"
        "<|startofturn|><|user|>\n47 + 38?<|endofturn|>"
        "<|startofturn|><|assistant|>\n⟦<think>\n7 + 8 = 15\n</think>\n85<|endofturn|>⟧"
        "<|startofturn|><|user|>\nAnd 1 more?<|endofturn|><|startofturn|><|assistant|>\n⟦86<|endofturn|>⟧",
    ),
    "tools": (
        [
            {"role": "user", "content": "Add 1 and 2, and 3 and 4."},
            {
                "role": "assistant",
                "content": "Calling.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}},
                    {"name": "add", "arguments": '{"a": 3, "b": 4}'},
                ],
            },
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "3 and 7."},
        ],
        "<|beginoftext|><|startofturn|><|user|>\nAdd 1 and 2, and 3 and 4.<|endofturn|>"
        '<|startofturn|><|assistant|>\n⟦Calling.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
        '</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|endofturn|>⟧'
        "<|startofturn|><|user|>\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response>"
        "<|endofturn|><|startofturn|><|assistant|>\n⟦3 and 7.<|endofturn|>⟧",
    ),
    "blank thinking and a blank text before a call": (
        [
            {"role": "user", "content": "Now."},
            {
                "role": "assistant",
                "reasoning_content": "\n",
                "content": " \n",
                "tool_calls": [{"name": "now", "arguments": {}}],
            },
        ],
        "<|beginoftext|><|startofturn|><|user|>\nNow.<|endofturn|>"
        '<|startofturn|><|assistant|>\n⟦<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|endofturn|>⟧',
    ),
    "call without text": (
        [
            {"role": "user", "content": "Now."},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "now", "arguments": {}}]},
        ],
        "<|beginoftext|><|startofturn|><|user|>\nNow.<|endofturn|>"
        '<|startofturn|><|assistant|>\n⟦<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|endofturn|>⟧',
    ),
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcript_and_its_loss_mask_to_the_token(tokenizer, name):
    messages, expected = TRANSCRIPTS[name]
    (ids,), (marks,) = encode_conversations(tokenizer, [messages])
    text, counts = render_loss_mask(tokenizer, ids, marks).rsplit("\n", 1)
    assert text == expected
    assert counts == f"[{sum(marks)} of {len(ids)} tokens trained]"


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_training_starts_each_reply_where_generation_does(tokenizer, name):
    messages, _ = TRANSCRIPTS[name]
    (ids,), (marks,) = encode_conversations(tokenizer, [messages])
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:position], add_generation_prompt=True)["input_ids"]
            assert ids[: len(prompt)] == prompt
            assert marks[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_tool_schemas_stand_in_the_system_turn(tokenizer):
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [{"role": "system", "content": "Be exact."}, *TRANSCRIPTS["tools"][0]]
    (ids,), (marks,) = encode_conversations(tokenizer, [messages], [tools])
    text = tokenizer.decode(ids)
    assert text.startswith("<|beginoftext|><|startofturn|><|system|>\nBe exact.\n\n")
    assert '{"type": "function", "function": {"name": "add"}}<|endofturn|><|startofturn|><|user|>' in text
    assert text.count("<|system|>") == 1
    (_, plain_marks) = encode_conversations(tokenizer, [TRANSCRIPTS["tools"][0]])
    assert sum(marks) == sum(plain_marks[0])


def test_generation_prompt_may_open_a_thought(tokenizer):
    messages = TRANSCRIPTS["one turn"][0][:1]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert text.endswith("<|startofturn|><|assistant|>\n<think>\n")


def test_text_in_parts_is_text(tokenizer):
    """The form in which OpenAI's clients send it."""
    whole = [{"role": role, "content": "What is\n1 + 1?"} for role in ("system", "user", "assistant", "tool")]
    parts = [{"type": "text", "text": " What is\n"}, {"type": "text", "text": "1 + 1? "}]
    apart = [message | {"content": parts} for message in whole]
    for tools in (None, [{"name": "add"}]):
        first, second = (tokenizer.apply_chat_template(turns, tools, tokenize=False) for turns in (whole, apart))
        assert first == second


def test_a_reply_that_was_begun_is_gone_on_with(tokenizer):
    messages = [*TRANSCRIPTS["one turn"][0][:1], {"role": "assistant", "content": "It is "}]
    text = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text.endswith("<|startofturn|><|assistant|>\nIt is")


def test_trl_finds_the_end_of_turn_trained(tokenizer):
    assert is_chat_template_stop_token_trained(tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "critic", "content": "x"}], "unknown role critic"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "must come first"),
        ([{"role": "user", "content": None}], "content must be text, or a list of text parts; it is None"),
        ([{"role": "user"}], "content must be text"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "content must be text"),
    ],
)
def test_template_refuses_what_it_cannot_write(tokenizer, messages, message):
    with pytest.raises(Exception, match=message):
        tokenizer.apply_chat_template(messages)


def test_conversation_without_a_reply_is_refused(tokenizer):
    with pytest.raises(ValueError, match="conversation 1 has no trained token"):
        encode_conversations(tokenizer, [TRANSCRIPTS["one turn"][0], [{"role": "user", "content": "x"}]])


def test_template_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = TRANSCRIPTS["tools"][0]
    assert again.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_tokenizer_without_markup_is_refused(tokenizer):
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="lacks the chat tokens"):
        attach_chat_template(bare)
    with pytest.raises(ValueError, match="lacks the stop tokens"):
        stop_token_ids(bare)


def test_stop_tokens_end_text_and_turn(tokenizer):
    model = SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace())
    set_stop_tokens(model, tokenizer)
    names = tokenizer.convert_ids_to_tokens
    assert names(model.generation_config.eos_token_id) == ["<|endoftext|>", "<|endofturn|>"]
    for settings in (model.config, model.generation_config):
        assert names([settings.pad_token_id, settings.bos_token_id]) == ["<|endoftext|>", "<|beginoftext|>"]
    assert names(model.config.eos_token_id) == "<|endoftext|>"


def test_preview_cuts_long_conversations(tokenizer):
    text = render_loss_mask(tokenizer, [10] * 50, [0] * 20 + [1] * 30, limit_tokens=40)
    assert text.endswith("⟧ … 10 more tokens\n[30 of 50 tokens trained]")
