"""What the decode benchmarks share: one token's attention by SDPA, static caches that are filled, and the models.

Shapes: B rows, S keys, G groups, r signal heads a group, D head dimension.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from attention_cases import epilogue
from torch.nn.functional import scaled_dot_product_attention
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_motif2 import Motif2Config, Motif2ForCausalLM

SIZES = {"hidden_size": 2048, "num_hidden_layers": 20, "intermediate_size": 8192, "vocab_size": 32000}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}


def by_sdpa(inputs: list) -> torch.Tensor:
    """One token by SDPA, two calls with the value in one piece, and the model's epilogue."""
    signal_query, noise_query, key, value, lambda_, weight = inputs
    outputs = []
    for query, half in ((signal_query, 0), (noise_query[:, :, :, None], 1)):
        states = (
            query.flatten(2, 3).transpose(1, 2),
            key[:, :, :, half].transpose(1, 2),
            value.flatten(3).transpose(1, 2),
        )
        out = scaled_dot_product_attention(*states, enable_gqa=True).transpose(1, 2)  # (B, 1, heads, 2D)
        outputs.append(out.unflatten(2, query.shape[2:4]))
    return epilogue(*outputs, lambda_, weight)


def by_sdpa_halves(inputs: list) -> torch.Tensor:
    """The same in four calls, a half of the value each."""
    signal_query, noise_query, key, value, lambda_, weight = inputs
    outputs = []
    for query, half in ((signal_query, 0), (noise_query[:, :, :, None], 1)):
        states = query.flatten(2, 3).transpose(1, 2), key[:, :, :, half].transpose(1, 2)
        parts = [
            scaled_dot_product_attention(*states, part.transpose(1, 2), enable_gqa=True).transpose(1, 2)
            for part in value.unbind(3)
        ]
        outputs.append(torch.cat(parts, dim=-1).unflatten(2, query.shape[2:4]))
    return epilogue(*outputs, lambda_, weight)


def parameters_read(model: torch.nn.Module) -> int:
    """Bytes of weights that a step reads: all but the embedding's table (unless it is also the head)."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def filled_cache(model, batch: int, context: int, length: int, device: torch.device) -> StaticCache:
    """A static cache of `length` places, `context` of them taken by random numbers; one token has gone through."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(torch.ones(batch, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return cache


@contextlib.contextmanager
def first_layers(model, count: int) -> Iterator[None]:
    """Cuts a model to its first layers for a while."""
    config, layers = model.config, model.model.layers
    types = getattr(config, "layer_types", None)
    try:
        model.model.layers, config.num_hidden_layers = layers[:count], count
        if types is not None:
            config.layer_types = types[:count]
        yield
    finally:
        model.model.layers, config.num_hidden_layers = layers, len(layers)
        if types is not None:
            config.layer_types = types


@contextlib.contextmanager
def in_float32(model, cache: StaticCache) -> Iterator[None]:
    """Lets a model's step run in float32, with the model's own products, a layer's weights at a time.

    Weights in bfloat16 go to float32 and back without loss.
    """
    states = [(layer, layer.keys, layer.values) for layer in cache.layers]
    products = [(layer, layer.products) for layer in model.model.layers if hasattr(layer, "products")]
    dtype = model.lm_head.weight.dtype

    def widen(module, inputs):
        module.float()
        return (inputs[0].float(),)

    def narrow(module, inputs, output):
        module.to(dtype)

    handles = []
    for module in (*model.model.layers, model.lm_head):
        handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    try:
        for layer, keys, values in states:
            layer.keys, layer.values = keys.float(), values.float()
        for layer, _ in products:
            layer.products = None
        yield
    finally:
        for layer, keys, values in states:
            layer.keys, layer.values = keys, values
        for layer, functions in products:
            layer.products = functions
        for handle in handles:
            handle.remove()


def models_of_one_size(tiny: bool) -> dict[str, Callable]:
    """What makes each model, by name and attention: 1.3B parameters without embeddings, as for the training table."""
    sizes = TINY if tiny else SIZES
    dim, groups = (8, 2) if tiny else (128, 4)
    common = {**sizes, "max_position_embeddings": 65536, "tie_word_embeddings": False}
    common |= {"head_dim": dim, "pad_token_id": None}
    motif = Motif2Config(
        **common, num_attention_heads=5 * groups, num_key_value_heads=2 * groups, num_noise_heads=groups
    )
    heads = {"num_attention_heads": 4 * groups, "num_key_value_heads": 2 * groups}
    return {
        "llama sdpa": lambda: LlamaForCausalLM(LlamaConfig(**common, **heads)),
        "diffllama sdpa": lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**common, **heads)),
        "motif2 sdpa": lambda: Motif2ForCausalLM(motif),
        "motif2 eager": lambda: Motif2ForCausalLM(motif),
        "motif2 gda_kernel": lambda: Motif2ForCausalLM(motif),
    }


def full_size_model(tiny: bool, device: torch.device, dtype: torch.dtype, **sizes) -> Motif2ForCausalLM:
    """Motif-2-12.7B, random weights; `sizes` of its configuration differ."""
    torch.manual_seed(0)
    small = {**TINY, "num_attention_heads": 6, "num_key_value_heads": 4, "num_noise_heads": 2, "head_dim": 16}
    config = Motif2Config(**(small if tiny else {"use_cache": True}) | sizes)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Motif2ForCausalLM(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(torch.float32)
