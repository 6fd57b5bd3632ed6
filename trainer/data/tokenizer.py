"""Train a byte-level BPE tokenizer that carries Motif's markup.

Source: the special tokens and the chat markup of the Motif-2 checkpoints. The official tokenizer has 219,520 entries
in the style of o200k; digits are split one by one here, which a small model needs for arithmetic (assumption).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BEGIN_OF_TEXT = "<|beginoftext|>"
END_OF_TURN = "<|endofturn|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    BEGIN_OF_TEXT,
    "<|startofturn|>",
    END_OF_TURN,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_NUM_BYTES = 256


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output_dir: str | Path | None = None, show_progress: bool = True
) -> PreTrainedTokenizerFast:
    """Train on `texts` and save as a Hugging Face fast tokenizer.

    Args:
        texts: documents; read once.
        vocab_size: entries, the special tokens included.
        output_dir: where `save_pretrained` writes; nothing is written without it.
        show_progress: show the library's progress bars.

    Returns:
        PreTrainedTokenizerFast: eos = pad = unk = `<|endoftext|>`, bos = `<|beginoftext|>` (never added on its own).

    Raises:
        ValueError: a vocabulary too small for the bytes and the markup, or no text at all.
    """
    smallest = _NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; use {smallest} or more, for 256 bytes and the markup")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_refuse_nothing(texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BEGIN_OF_TEXT, END_OF_TEXT)],
        clean_up_tokenization_spaces=False,
    )
    if output_dir is not None:
        fast.save_pretrained(output_dir)
    return fast


def _refuse_nothing(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("no text to train a tokenizer on; give at least one document that is not empty")
