"""Batched products on the Triton kernels: launches, tile choices, and the buffers an iteration works in.

Shapes: N matrices in the batch, S rows, L columns, S <= L, K depth of a product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_kernels import normalise_kernel, square_sums_kernel, symmetric_product_kernel

# Row strides of the bulk copy engine are multiples of 16 bytes: 8 elements of a half type.
_ALIGNMENT = 8
_NORM_PARTS = 512
# A stride longer than any launch; a constant, so that a kernel is not compiled again for every batch size.
_ONE_UNIT_EACH = 2**20
_INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut and launched.

    Args:
        block: rows of a tile.
        wide: columns of a tile, `block` or `2 * block`.
        block_k: depth of one pipeline stage.
        num_stages: pipeline stages.
        num_warps: warps a program.
        flatten: let the loads of a program's next tile run under the end of the last one.
        persistent: one program a multiprocessor instead of one a tile.
    """

    block: int = 128
    wide: int = 256
    block_k: int = 64
    num_stages: int = 3
    num_warps: int = 8
    flatten: bool = True
    persistent: bool = True

    def __post_init__(self):
        if self.wide not in (self.block, 2 * self.block):
            raise ValueError(f"wide={self.wide} must be block or 2 * block, here {self.block} or {2 * self.block}")


# Fastest on an H200 at the sizes of Motif-2-12.7B; up to HOPPER_NARROW_ROWS rows, smaller tiles fill it better. One
# program a tile takes the same time alone, and much less where other kernels, such as NCCL's, hold multiprocessors.
HOPPER = TileConfig(num_stages=4, flatten=False, persistent=False)
HOPPER_NARROW = TileConfig(wide=128, num_stages=4, flatten=False, persistent=False)
HOPPER_NARROW_ROWS = 2048
SMALL = TileConfig(block=64, wide=128, block_k=32, num_stages=3, num_warps=4, flatten=False)


@cache
def _device_properties(index: int) -> tuple[int, int]:
    """Compute capability's major number and multiprocessor count."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def default_config(device: torch.device, size: int) -> TileConfig:
    """Tiles for matrices of `size` rows, whatever their number; on other devices than Hopper an assumption."""
    if device.type == "cuda" and _device_properties(device.index)[0] == 9:
        return HOPPER_NARROW if size <= HOPPER_NARROW_ROWS else HOPPER
    return SMALL


def _launch_size(device: torch.device, units: int, config: TileConfig) -> tuple[int, int]:
    """Programs to launch, and the stride between the units of one program."""
    if not config.persistent:
        return units, _ONE_UNIT_EACH
    programs = _device_properties(device.index)[1] if device.type == "cuda" else _INTERPRETED_PROGRAMS
    return programs, programs


def aligned_empty(batch: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised (batch, rows, columns) whose row stride suits the bulk copy engine."""
    padded = triton.cdiv(columns, _ALIGNMENT) * _ALIGNMENT
    return torch.empty(batch, rows, padded, dtype=dtype, device=device)[:, :, :columns]


def _describe(tensor: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, *block])


def _check_operand(name: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} has dtype {tensor.dtype}: the kernels take float16 or bfloat16")
    if tensor.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be (batch, rows, columns)")
    if tensor.stride(2) != 1 or tensor.stride(1) % _ALIGNMENT or tensor.stride(0) % _ALIGNMENT:
        raise ValueError(f"{name} has strides {tensor.stride()}: make one with aligned_empty() and copy into it")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} starts at an address that is no multiple of 16 bytes: clone() it")
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, left is {like.dtype} on {like.device}")


def symmetric_product(
    left: torch.Tensor,
    right: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """alpha * left @ right' + beta * addend + gamma * I, computed above the diagonal and mirrored.

    Args:
        left: (N, S, K), float16 or bfloat16, rows aligned to 16 bytes.
        right: (N, S, K) such that left @ right' is symmetric: `left` itself (the default), or for symmetric operands
            that commute any of them, since then right' is right.
        addend: (N, S, S), symmetric, or None.
        alpha: factor of the product.
        beta: factor of the addend.
        gamma: added to the diagonal.
        out: (N, S, S) to write to; must not overlap an operand other than in full tiles, so pass another tensor.
        config: tiles; the device's default when None.

    Returns:
        (N, S, S) in the operands' type; sums are float32.

    Raises:
        ValueError: for shapes, types, strides or addresses the kernel cannot take.
    """
    right = left if right is None else right
    _check_operand("left", left)
    _check_operand("right", right, left)
    if right.shape != left.shape:
        raise ValueError(f"right has shape {tuple(right.shape)}: it must equal left's, {tuple(left.shape)}")
    batch, size, depth = left.shape
    config = config or default_config(left.device, size)
    for name, tensor in (("addend", addend), ("out", out)):
        if tensor is not None:
            _check_operand(name, tensor, left)
            if tensor.shape != (batch, size, size):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {(batch, size, size)}")
    if out is None:
        out = aligned_empty(batch, size, size, left.dtype, left.device)
    block, wide = config.block, config.wide
    columns = triton.cdiv(size, wide)
    if wide == 2 * block:
        tiles, odd_diagonals = columns * columns, triton.cdiv(size, block) // 2
    else:
        tiles, odd_diagonals = columns * (columns + 1) // 2, 0
    units = tiles * batch + triton.cdiv(odd_diagonals * batch, 2)
    programs, stride = _launch_size(left.device, units, config)
    output = _describe(out, (block, block))
    symmetric_product_kernel[(programs,)](
        _describe(left, (block, config.block_k)),
        _describe(right, (wide, config.block_k)),
        _describe(right, (block, config.block_k)),
        output if addend is None else _describe(addend, (block, block)),
        output,
        float(alpha),
        float(beta),
        float(gamma),
        depth,
        tiles,
        odd_diagonals,
        batch,
        BLOCK=block,
        WIDE=wide,
        BLOCK_K=config.block_k,
        HAS_ADDEND=addend is not None,
        HAS_GAMMA=gamma != 0,
        PROGRAMS=stride,
        FLATTEN=config.flatten,
        num_stages=config.num_stages,
        num_warps=config.num_warps,
    )
    return out


def normalise(source: torch.Tensor, out: torch.Tensor, eps: float, transpose: bool) -> None:
    """out = source / (Frobenius norm of each matrix + eps), in float32 until the cast.

    Args:
        source: (N, rows, columns), last dimension contiguous.
        out: (N, rows, columns), or (N, columns, rows) with `transpose`; last dimension contiguous.
        eps: added to the norm.
        transpose: write the transposed matrices.

    Raises:
        ValueError: for a matrix of 2^31 elements or more, which the kernels' offsets do not reach.
    """
    batch, rows, columns = source.shape
    if max(rows * source.stride(1), out.shape[1] * out.stride(1)) >= 2**31:
        raise ValueError(f"a matrix of shape {(rows, columns)} spans 2^31 elements or more: use backend='torch'")
    partial_sums = torch.empty(batch, _NORM_PARTS, dtype=torch.float32, device=source.device)
    square_sums_kernel[(_NORM_PARTS, batch)](
        source, partial_sums, rows, columns, source.stride(0), source.stride(1), BLOCK=4096, num_warps=8
    )
    block_rows, block_columns = (64, 64) if transpose else (16, 256)
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)
    normalise_kernel[(tiles, batch)](
        source,
        partial_sums,
        out,
        rows,
        columns,
        source.stride(0),
        source.stride(1),
        out.stride(0),
        out.stride(1),
        eps,
        PARTS=_NORM_PARTS,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        TRANSPOSE=transpose,
        num_warps=4,
    )


class TritonProducts:
    """Products of a batch of shapes that are equal up to transposition, in parts that are equal as they lie.

    Each part is normalised as it lies, by itself, and written as (N, S, L): from there on all are one batch.

    X lives in N of N + 1 slots of one buffer. `left @ X` is written matrix by matrix into the slot that the one before
    has just left free, so a batch needs one matrix more than its own size, not twice that. One matrix at a time also
    keeps cuBLAS from choosing its algorithm by the batch's size, which would make results depend on it.

    Args:
        sources: of each part (N, rows, columns), last dimension contiguous, any floating type, either orientation.
        results: of each part (N, rows, columns), where `apply(last=True)` writes.
        dtype: float16 or bfloat16, of every stored intermediate.
        eps: added to the Frobenius norm.
        config: tiles; the device's default when None.
    """

    def __init__(
        self,
        sources: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        dtype: torch.dtype,
        eps: float,
        config: TileConfig | None = None,
    ):
        self.config = config
        self.results = [(whole, len(whole) > whole.size(1)) for result in results for whole in result]  # and if tall
        self.batch = len(self.results)
        size, length = sorted(sources[0].shape[1:])
        self.slots = aligned_empty(self.batch + 1, size, length, dtype, sources[0].device)  # (N + 1, S, L)
        self.first = 1
        for source, x in zip(sources, self.x.split([len(source) for source in sources]), strict=True):
            normalise(source, x, eps, transpose=source.size(1) > source.size(2))

    @property
    def x(self) -> torch.Tensor:
        """The current matrices, (N, S, L)."""
        return self.slots[self.first : self.first + self.batch]

    def gram(self) -> torch.Tensor:
        return symmetric_product(self.x, config=self.config)  # (N, S, S)

    def symmetric(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        addend: torch.Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
    ) -> torch.Tensor:
        return symmetric_product(left, right, addend, alpha, beta, gamma, config=self.config)  # (N, S, S)

    def shift(self, matrix: torch.Tensor, amount: float) -> torch.Tensor:
        shifted = aligned_empty(*matrix.shape, matrix.dtype, matrix.device).copy_(matrix)  # (N, S, S)
        diagonal = shifted.diagonal(dim1=-2, dim2=-1)  # (N, S)
        diagonal.copy_(diagonal.float() + amount)
        return shifted

    def apply(self, left: torch.Tensor, last: bool = False) -> None:
        x, target = self.x, 1 - self.first
        for index in range(self.batch) if self.first else reversed(range(self.batch)):
            result, transposed = self.results[index]
            direct = last and result.dtype == self.slots.dtype
            factors = (left[index], x[index])
            out = self.slots[target + index]
            if direct:
                out = result
                factors = (x[index].mT, left[index]) if transposed else factors
            torch.mm(*factors, out=out)
            if last and not direct:
                result.copy_(out.mT if transposed else out)
        self.first = target
