"""Motif's chat markup on a tokenizer: the template, the tokens that end a reply, and a look at what is trained.

Shapes: one conversation is a list of T token ids and a list of T marks (1: the loss counts it).
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
# Tokens that only the template may write: inside a text they would forge a turn.
STRUCTURE_TOKENS = tuple(token for token in SPECIAL_TOKENS if token.startswith("<|"))

# Where an assistant's reply starts when nothing comes before it.
REPLY_HEADER = f"{BEGIN_OF_TEXT}<|startofturn|><|assistant|>\n"


def attach_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer Motif's chat template, in place.

    Args:
        tokenizer: must know every markup token as one token.

    Returns:
        The same tokenizer, with `chat_template` set.

    Raises:
        ValueError: a markup token is missing from the vocabulary.

    Source: arXiv 2511.07464 (markup as published with the instruct checkpoint); tool turns are an assumption.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer lacks the chat tokens {missing}; train it with trainer.data.tokenizer.train_tokenizer, "
            "or add them with tokenizer.add_special_tokens and resize the model's embeddings"
        )
    tokenizer.chat_template = TEMPLATE_PATH.read_text(encoding="utf-8")
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids on which generation ends: end of text, and end of the assistant's turn.

    Raises:
        ValueError: the tokenizer lacks one of the two tokens.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (END_OF_TEXT, END_OF_TURN) if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks the stop tokens {missing}; use a tokenizer with Motif's markup")
    return [vocabulary[END_OF_TEXT], vocabulary[END_OF_TURN]]


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the stop, padding and start tokens into the model's configurations: `generate` ends with the turn."""
    stop_ids = stop_token_ids(tokenizer)
    start_id = tokenizer.convert_tokens_to_ids(BEGIN_OF_TEXT)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = start_id
        settings.eos_token_id = settings.pad_token_id = stop_ids[0]
    model.generation_config.eos_token_id = stop_ids


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]], tools: Sequence | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize whole conversations with the attached template.

    Args:
        tokenizer: with a chat template that has generation marks.
        conversations: lists of messages (`role`, `content`, optionally `reasoning_content` and `tool_calls`).
        tools: for each conversation its list of tool schemas, or None; None when no conversation has tools.

    Returns:
        tuple: token ids and assistant marks, each one list per conversation.

    Raises:
        ValueError: a conversation has no token that the loss would count.
    """
    if tools is not None and any(tools):
        encoded = [_encode(tokenizer, [turns], own) for turns, own in zip(conversations, tools, strict=True)]
        token_ids = [ids for batch, _ in encoded for ids in batch]
        marks = [mark for _, batch in encoded for mark in batch]
    else:
        token_ids, marks = _encode(tokenizer, list(conversations), None)
    for position, mark in enumerate(marks):
        if not any(mark):
            raise ValueError(
                f"conversation {position} has no trained token: {conversations[position]!r:.200}; "
                "it needs an assistant turn, and the chat template {% generation %} marks"
            )
    return token_ids, marks


def _encode(tokenizer, conversations: list, tools) -> tuple[list[list[int]], list[list[int]]]:
    encoded = tokenizer.apply_chat_template(
        conversations,
        tools=tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=False,
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def render_loss_mask(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], marks: Sequence[int], limit_tokens: int = 400
) -> str:
    """A conversation as text, with `⟦` and `⟧` around what the loss counts.

    Args:
        tokenizer: decodes the ids.
        token_ids: T ids.
        marks: T marks, 1 where the loss counts the token.
        limit_tokens: tokens shown before the rest is cut and counted.

    Returns:
        str: the text, with a last line that counts trained and all tokens.
    """
    spans: list[tuple[bool, list[int]]] = []
    for token, mark in zip(token_ids[:limit_tokens], marks[:limit_tokens], strict=True):
        if not spans or spans[-1][0] != bool(mark):
            spans.append((bool(mark), []))
        spans[-1][1].append(token)
    pieces = [f"⟦{tokenizer.decode(tokens)}⟧" if trained else tokenizer.decode(tokens) for trained, tokens in spans]
    cut = f" … {len(token_ids) - limit_tokens} more tokens" if len(token_ids) > limit_tokens else ""
    return "".join(pieces) + f"{cut}\n[{sum(marks)} of {len(token_ids)} tokens trained]"
