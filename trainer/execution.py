"""How a model's decoder layers run: products in FP8, recomputed in the backward pass, compiled.

Each function changes the model in place and keeps its parameters and their names, so that optimizer, checkpoints and
export see the same model. The order is `bfloat16_residual`, `convert_to_fp8`, `recompute_layers`, `compile_layers`.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

FP8_ALIGNMENT = 16  # both sizes of an FP8 matrix product must be multiples of it
FP8_CAPABILITY = (8, 9)
COMPILED_VARIANTS = 64  # assumption: shapes times training and evaluation; torch gives up after 8
# On Hopper cuDNN's attention is faster than PyTorch's first choice (modeling_motif2/README.md, attention backends).
CUDNN_CAPABILITY = (9, 0)
ATTENTION_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Results that selective recomputation keeps: products and attention, which cost more to compute than to hold.
KEPT_OPERATORS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
KEPT_NAMES = frozenset({"gda_attention"})  # of our kernels' operators, whose namespace goes with their content


def bfloat16_residual(model: nn.Module) -> None:
    """Keep the residual stream in bfloat16 where autocast would keep it in float32, as FSDP2's mixed precision does.

    Args:
        model: a Motif-2 model.
    """

    def narrow(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.bfloat16() if torch.is_autocast_enabled(output.device.type) else output

    model.model.embed_tokens.register_forward_hook(narrow)


def convert_to_fp8(model: nn.Module, recipe: str, skip_edge_layers: int = 1, emulate: bool = False) -> list[str]:
    """Compute the products of the decoder layers' matrices in FP8 with row-wise scaling, through torchao.

    The parameters stay what they are; torchao replaces the modules around them. Embedding and head are left alone.

    Args:
        model: a Motif-2 model with a head, not yet sharded.
        recipe: torchao's "rowwise" (all three products in FP8) or "rowwise_with_gw_hp" (the weights' gradients come
            from products in bfloat16; those of the inputs accumulate as fast as the forward's, which torchao's own
            recipe does not do: on Hopper only then a product by rows is one kernel).
        skip_edge_layers: how many layers at each end stay as they are.
        emulate: compute the FP8 products in float32, on any device; slow.

    Returns:
        list[str]: names of the converted modules.

    Raises:
        ValueError: torchao or the hardware cannot do it, no layer is left, or a matrix has sizes that FP8 products
            cannot take.

    Source: arXiv 2511.07464, pre-training ("FP8 with row-wise scaling, gradients in BF16").
    """
    try:
        from torchao.float8 import Float8GemmConfig, Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(
            f"fp8 is {recipe!r}, but torchao cannot be imported ({error}): pip install 'motif2[fp8]', or set fp8 none"
        ) from error
    layers = model.model.layers
    inner = range(skip_edge_layers, len(layers) - skip_edge_layers)
    if not inner:
        raise ValueError(
            f"fp8_skip_edge_layers is {skip_edge_layers}, which leaves none of {len(layers)} layers: lower it"
        )
    if not emulate:
        require_fp8_hardware()
    chosen = {
        f"model.layers.{index}.{name}": module
        for index in inner
        for name, module in layers[index].named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, module in chosen.items():
        if module.in_features % FP8_ALIGNMENT or module.out_features % FP8_ALIGNMENT:
            raise ValueError(
                f"{name} is {module.out_features} x {module.in_features}: FP8 products need multiples of "
                f"{FP8_ALIGNMENT}; change the model's sizes, or set fp8 none"
            )
    settings = Float8LinearConfig.from_recipe_name(recipe)
    changes = {"emulate": emulate}
    if recipe == "rowwise_with_gw_hp":
        changes["gemm_config_grad_input"] = Float8GemmConfig(use_fast_accum=True)
    for name, value in changes.items():
        object.__setattr__(settings, name, value)  # a frozen dataclass whose recipes take no argument
    convert_to_float8_training(model, config=settings, module_filter_fn=lambda _, name: name in chosen)
    return list(chosen)


def require_fp8_hardware() -> None:
    """Check that this process has a device that multiplies FP8 matrices.

    Raises:
        ValueError: it has not; the message names the device and its capability.
    """
    mend = "set fp8 none, or fp8_emulate true to try it out slowly"
    if not torch.cuda.is_available():
        raise ValueError(f"fp8 needs a GPU that multiplies FP8 matrices, and this process sees none: {mend}")
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < FP8_CAPABILITY:
        raise ValueError(
            f"fp8 needs compute capability {_dotted(FP8_CAPABILITY)} (Ada, Hopper) or newer, and "
            f"{torch.cuda.get_device_name()} has {_dotted(capability)}: {mend}"
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def recompute_layers(model: nn.Module, mode: str, every: int = 1) -> None:
    """Recompute decoder layers in the backward pass instead of keeping what it needs.

    Args:
        model: a Motif-2 model.
        mode: "full" keeps a layer's input alone; "selective" also the results of products and attention.
        every: only each `every`-th layer, from the first on.
    """
    context_fn = None
    if mode == "selective":
        context_fn = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    for layer in model.model.layers[::every]:
        layer.forward = _recomputed(layer.forward, context_fn)


def _keep_products(context, operator, *args, **kwargs) -> CheckpointPolicy:
    named = operator.name().partition("::")[2] in KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if named or operator in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(forward: Callable, context_fn: Callable | None) -> Callable:
    options = {} if context_fn is None else {"context_fn": context_fn}

    def recomputed(hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return checkpoint(
            forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **options, **kwargs
        )  # no randomness in a layer

    return recomputed


def compile_layers(model: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile each decoder layer on its own, and the last norm, without graph breaks; the layers share their code.

    What surrounds a layer's forward, such as FSDP2's transfers, stays outside.

    Args:
        model: a Motif-2 model; its recomputation, if any, is compiled too.
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    for module in (*model.model.layers, model.model.norm):
        module.forward = torch.compile(module.forward, backend=backend, fullgraph=True)


def fast_attention() -> contextlib.AbstractContextManager:
    """Inside the block PyTorch's attention takes cuDNN's kernels first, on GPUs where they are the fastest."""
    if torch.version.cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() >= CUDNN_CAPABILITY:
        return sdpa_kernel(ATTENTION_ORDER, set_priority=True)
    return contextlib.nullcontext()
