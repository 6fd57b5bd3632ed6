"""The entry: checks, choice of backend and types, and the batch laid out for it.

Shapes: N matrices of a part of the batch (all leading dimensions as one), rows and columns in either order.
"""

import importlib.util
import math
from collections.abc import Sequence

import torch

from .arithmetic import default_restarts
from .coefficients import Step, resolve_coefficients
from .iteration import classic_iteration, gram_iteration
from .torch_products import TorchProducts

BACKENDS = ("auto", "triton", "torch", "quack")
METHODS = ("gram", "classic")
# float16 keeps three bits more than bfloat16: the Gram form needs them, and normalised operands stay in its range.
_HALF_TYPE = {"gram": torch.float16, "classic": torch.bfloat16}
EPS = 1e-7


def _triton_runs_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    import triton

    return device.type == "cpu" and triton.knobs.runtime.interpret


def choose_backend(backend: str, matrices: torch.Tensor) -> str:
    """Backend that will run; `"auto"` is `"triton"` on NVIDIA devices, `"torch"` elsewhere and for float64.

    Raises:
        ValueError: for an unknown backend, or one that cannot run on these matrices.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        on_gpu = matrices.is_cuda and matrices.dtype != torch.float64 and _triton_runs_on(matrices.device)
        return "triton" if on_gpu else "torch"
    if backend != "torch":
        if matrices.dtype == torch.float64:
            raise ValueError(f"backend={backend!r} computes in half types: use backend='torch' for float64")
        if not _triton_runs_on(matrices.device):
            raise ValueError(
                f"backend={backend!r} cannot run on {matrices.device}: use backend='torch', or an NVIDIA device of "
                "compute capability 8.0 or later with triton installed"
            )
    if backend == "quack" and importlib.util.find_spec("quack") is None:
        raise ValueError("backend='quack' needs the package quack-kernels: install it, or use backend='triton'")
    return backend


def _choose_compute_dtype(
    requested: torch.dtype | None, backend: str, method: str, matrices: torch.Tensor
) -> torch.dtype:
    if backend != "torch":
        if requested not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"compute_dtype={requested} needs backend='torch': the kernels take float16 or bfloat16")
        return requested or _HALF_TYPE[method]
    if requested is not None:
        if not requested.is_floating_point:
            raise ValueError(f"compute_dtype={requested} must be a floating type")
        return requested
    if matrices.device.type == "cpu" or matrices.dtype == torch.float64:
        return torch.promote_types(matrices.dtype, torch.float32)
    return _HALF_TYPE[method]


def _check_restarts(restarts: tuple[int, ...], num_steps: int) -> tuple[int, ...]:
    restarts = tuple(restarts)
    for restart in restarts:
        if not 0 < restart < num_steps:
            raise ValueError(f"restarts={restarts}: each must lie in 1 .. {num_steps - 1}, the steps after the first")
    return restarts


def _check_parts(parts: Sequence[torch.Tensor]) -> None:
    for part in parts:
        if part.dim() < 2 or not part.is_floating_point():
            raise ValueError(
                f"matrices is {part.dtype} of shape {tuple(part.shape)}: floating (..., rows, columns) needed"
            )
    if not parts:
        raise ValueError("matrices is an empty sequence: pass a tensor, or at least one")
    first = parts[0]
    shapes = (tuple(first.shape[-2:]), (first.shape[-1], first.shape[-2]))
    for part in parts[1:]:
        if tuple(part.shape[-2:]) not in shapes or part.dtype != first.dtype or part.device != first.device:
            found = ", ".join(f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in parts)
            raise ValueError(
                f"matrices are {found}: parts of a batch need one type, one device, and one shape up to transposition"
            )


def _outputs(parts: Sequence[torch.Tensor], out: torch.Tensor | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """Where to write each part: `out`, checked, or new tensors."""
    if out is None:
        return [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts]
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    if len(outs) != len(parts) or any(each.dtype != outs[0].dtype for each in outs):
        raise ValueError(f"out has {len(outs)} tensors: it must have one for each of {len(parts)}, of one type")
    for part, each in zip(parts, outs, strict=True):
        if each.shape != part.shape or each.device != part.device or not each.is_contiguous():
            raise ValueError(
                f"out has shape {tuple(each.shape)} on {each.device}: it must be a contiguous tensor like matrices, "
                f"{tuple(part.shape)} on {part.device}"
            )
    return outs


@torch.no_grad()
def newton_schulz(
    matrices: torch.Tensor | Sequence[torch.Tensor],
    method: str = "gram",
    coefficients: str | tuple[Step, ...] = "motif",
    restarts: tuple[int, ...] | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Approximate U V' of each matrix's singular value decomposition U S V' by a few polynomial steps.

    Each matrix is divided by its Frobenius norm + 1e-7 in float32, then cast. Matrices are independent: the batch one
    comes in does not change a bit of its result, and results repeat bit for bit. A zero matrix gives zeros.

    Args:
        matrices: (..., rows, columns), any floating type; tall matrices are treated as their transposes. Or a sequence
            of such tensors whose shapes (rows, columns) are equal up to transposition: one batch all the same.
        method: `"gram"` iterates on the Gram matrix (fewest operations), `"classic"` on the matrix itself.
        coefficients: `"motif"`, `"polar_express"`, `"jordan"`, or (a, b, c) for each step.
        restarts: steps before which the Gram form computes its Gram matrix anew; by default (2,), and (2, 3) for
            nearly square matrices, with more than five steps also every second one later. The classic form has
            nothing to restart.
        backend: `"auto"`, `"triton"`, `"torch"` or `"quack"`.
        compute_dtype: type of every stored intermediate. Default: float16 for `"gram"` and bfloat16 for `"classic"` on
            accelerators; float32 on the CPU; float64 for float64 matrices.
        out: contiguous tensor of the same shape to write to, in any floating type; it may share the memory of
            `matrices` where both have elements of one size. For a sequence, one for each tensor.

    Returns:
        (..., rows, columns) in the type of `matrices`, or `out`; for a sequence a list of these.

    Raises:
        ValueError: for settings that contradict each other, the tensors or the machine; the message names the mend.

    Source: Muon (Jordan 2024); the Gram form after Dao-AILab/gram-newton-schulz; Motif-2-12.7B report, section 4.3.
    """
    single = isinstance(matrices, torch.Tensor)
    parts = [matrices] if single else list(matrices)
    _check_parts(parts)
    steps = resolve_coefficients(coefficients)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
    if restarts is None:
        restarts = default_restarts(*parts[0].shape[-2:], len(steps))
    restarts = _check_restarts(restarts, len(steps))
    outs = _outputs(parts, out)
    if torch.compiler.is_compiling():
        flat = [value for step in steps for value in step]
        _operator(parts, outs, method, flat, list(restarts), backend, compute_dtype)
    else:
        _orthogonalize(parts, outs, method, steps, restarts, backend, compute_dtype)
    return outs[0] if single else outs


def _orthogonalize(
    parts: list[torch.Tensor],
    outs: list[torch.Tensor],
    method: str,
    steps: tuple[Step, ...],
    restarts: tuple[int, ...],
    backend: str,
    compute_dtype: torch.dtype | None,
) -> None:
    backend = choose_backend(backend, parts[0])
    dtype = _choose_compute_dtype(compute_dtype, backend, method, parts[0])
    sources = [part.reshape(math.prod(part.shape[:-2]), *part.shape[-2:]) for part in parts if part.numel()]
    results = [out.view(-1, *out.shape[-2:]) for out in outs if out.numel()]  # (N, rows, columns) each, as sources
    if not sources:
        return
    if backend == "torch":
        pairs = (pair for both in zip(sources, results, strict=True) for pair in zip(*both, strict=True))
        runs = (TorchProducts(source, result, dtype, EPS) for source, result in pairs)
    else:
        sources = [source if source.stride(2) == 1 else source.contiguous() for source in sources]
        if backend == "quack":
            from .quack_products import QuackProducts as BatchedProducts
        else:
            from .triton_products import TritonProducts as BatchedProducts
        runs = (BatchedProducts(sources, results, dtype, EPS),)
    for products in runs:
        if method == "gram":
            gram_iteration(products, steps, restarts)
        else:
            classic_iteration(products, steps)


@torch.library.custom_op(f"{__package__}::orthogonalize", mutates_args=("out",))
def _operator(
    matrices: list[torch.Tensor],
    out: list[torch.Tensor],
    method: str,
    coefficients: list[float],
    restarts: list[int],
    backend: str,
    compute_dtype: torch.dtype | None,
) -> None:
    """The whole pass as one operator, for `torch.compile`."""
    steps = tuple(zip(coefficients[0::3], coefficients[1::3], coefficients[2::3], strict=True))
    _orthogonalize(matrices, out, method, steps, tuple(restarts), backend, compute_dtype)
