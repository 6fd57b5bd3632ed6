"""Small models that the model's tests share."""

import torch

import kernels_hub
from modeling_motif2 import Motif2Config, Motif2ForCausalLM

VOCAB_SIZE = 61


def small_config(groups: int = 2, ratio: int = 2, layers: int = 2, **overrides) -> Motif2Config:
    """A configuration of toy size; weights are drawn large so that attention is far from uniform."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": groups * (ratio + 1),
        "num_key_value_heads": 2 * groups,
        "num_noise_heads": groups,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "lambda_std_dev": 0.5,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Motif2Config(**(settings | overrides))


def small_model(seed: int = 0, attention: str = "eager", dtype: torch.dtype = torch.float32, **overrides):
    """A randomly initialised `Motif2ForCausalLM` in evaluation mode; norm weights are off their start."""
    torch.manual_seed(seed)
    config = small_config(**overrides)
    model = Motif2ForCausalLM(config).eval()
    # Set afterwards: transformers would look for flash attention's package, or for its kernel on the Hub.
    config._attn_implementation = attention
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "subln" in name or "act_fn" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def with_kernel(name: str = "gda_kernel", **overrides):
    """A small model in float64 with the attention kernel in it, `name` its attention."""
    model = small_model(**({"dtype": torch.float64, "ratio": 3} | overrides))
    kernels_hub.use_gda_attention(model)
    model.config._attn_implementation = name
    return model


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, tokens) above the special tokens."""
    return torch.randint(3, VOCAB_SIZE, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def outputs_of_documents(model, layout: str, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each document (tokens, vocabulary) from one call.

    Args:
        model: whose.
        layout: padded at the "left" or "right", "packed" into a row by positions, or by borders ("cu_seq_lens").
        documents: (tokens,) each.
    """
    lengths = [len(document) for document in documents]
    row = torch.cat(documents)[None]
    with torch.no_grad():
        if layout == "packed":
            position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
            return model(row, position_ids=position_ids).logits[0].split(lengths)
        if layout == "cu_seq_lens":
            borders = torch.tensor([0, *lengths]).cumsum(0).int()
            return model(row, cu_seq_lens_q=borders, cu_seq_lens_k=borders).logits[0].split(lengths)
        width = max(lengths)
        spans = [slice(width - n, None) if layout == "left" else slice(0, n) for n in lengths]
        ids = torch.zeros(len(lengths), width, dtype=torch.long)
        for index, (span, document) in enumerate(zip(spans, documents, strict=True)):
            ids[index, span] = document
        logits = model(ids, attention_mask=(ids != 0).long()).logits
    return [logits[index, span] for index, span in enumerate(spans)]
