"""How every tensor of a grown Motif-2 follows from its parent's tensors, so that the function stays the same.

Width clones the residual stream and the MLP (hypercloning), the signal ratio copies signal heads inside their group,
and depth inserts copies of blocks that add nothing yet (LLaMA-Pro). All three rest on one rule for matrices: a row of
the target is a row of the source, and a source column's value is divided among that column's copies.

Shapes: G groups, r signal heads a group, D head dimension; a weight is (out features, in features).

Source: arXiv 2511.07464, section 2; HyperCloning, arXiv 2409.12903; LLaMA-Pro, arXiv 2401.02415. The compensation of
lambda_init, and rounding copies so that what is stored still sums to the source's value, are ours.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch

from .attention import lambda_init
from .configuration_motif2 import Motif2Config
from .growth_plan import Growth, tensor_shapes

BLOCK_ELEMENTS = 2**23
# Below this length of both lambda vectors (assumption) they give no direction, and are set anew.
SHORTEST_LAMBDA_VECTOR = 1e-6


class TensorSource(Protocol):
    """Reads tensors by name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, on the CPU in the stored dtype."""


@dataclass(frozen=True)
class ZeroRule:
    """Zeros: the output projections of inserted blocks."""

    shape: tuple[int, ...]

    def blocks(self, source: TensorSource, dtype: torch.dtype, name: str) -> Iterator[torch.Tensor]:
        """Yields the grown tensor's rows in order, a bounded number at a time."""
        for start, stop in row_blocks(self.shape):
            yield torch.zeros(stop - start, *self.shape[1:], dtype=dtype)


@dataclass(frozen=True)
class VectorRule:
    """A small tensor computed at once, in float64, from a few source tensors."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    compute: Callable[..., torch.Tensor]

    def blocks(self, source: TensorSource, dtype: torch.dtype, name: str) -> Iterator[torch.Tensor]:
        """Yields the grown tensor."""
        tensors = [source.rows(tensor, 0, source.shape(tensor)[0]).double() for tensor in self.sources]
        yield self.compute(*tensors).to(dtype)


@dataclass(frozen=True, eq=False)
class MatrixRule:
    """A weight whose rows and columns are copies of the source's.

    Args:
        shape: (R, C) of the grown weight.
        source: name of the source weight (R', C').
        rows: (R,) int64, the source row of each row.
        columns: (C,) int64, the source column of each column.
        divide: divide a source column's value among its copies; otherwise every copy is the whole value.
        noise_snr_db: noise on divided columns; it sums to zero over the copies of a column.
        seed: of the noise, which also depends on the grown tensor's name.
    """

    shape: tuple[int, int]
    source: str
    rows: torch.Tensor
    columns: torch.Tensor
    divide: bool
    noise_snr_db: float | None = None
    seed: int = 0

    @cached_property
    def column_groups(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """For each number of copies k that occurs: k, the N source columns (N,), and their copies' columns (N, k)."""
        counts = torch.bincount(self.columns)
        by_source = torch.argsort(self.columns, stable=True)
        ends = torch.cumsum(counts, 0)
        groups = []
        for copies in counts.unique().tolist():
            sources = torch.nonzero(counts == copies).flatten()
            targets = by_source[(ends[sources] - copies)[:, None] + torch.arange(copies)]  # (N, k)
            groups.append((copies, sources, targets))
        return groups

    def blocks(self, source: TensorSource, dtype: torch.dtype, name: str) -> Iterator[torch.Tensor]:
        """Yields the grown tensor's rows in order, a bounded number at a time."""
        magnitude = root_mean_square(source, self.source) if self.noise_snr_db is not None else 0.0
        noise_std = 0.0 if self.noise_snr_db is None else magnitude * 10 ** (-self.noise_snr_db / 20)
        for start, stop in row_blocks(self.shape):
            wanted = self.rows[start:stop]
            low, high = int(wanted.min()), int(wanted.max()) + 1
            rows = source.rows(self.source, low, high)
            rows = rows if torch.equal(wanted, torch.arange(low, high)) else rows[wanted - low]  # (rows, C')
            if not self.divide:
                yield rows.to(dtype)[:, self.columns]
                continue
            digest = hashlib.sha256(f"{self.seed}:{name}:{start}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
            yield self._divided(rows, dtype, noise_std, generator)

    def _divided(
        self, rows: torch.Tensor, dtype: torch.dtype, noise_std: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Divides every source column among its copies.

        Copies are made one after another, each an equal part of what remains, plus noise; what remains is reckoned
        from the copy as stored. So the last copy makes up for the noise and the rounding of the others, and the noise
        of k copies sums to zero: +N and -N for two, and for k jointly Gaussian with equal variances and correlation
        -1 / (k - 1).
        """
        # Wide enough for what remains to be reckoned without rounding.
        work = torch.float32 if rows.dtype.itemsize == dtype.itemsize == 2 else torch.float64
        grown = torch.empty(len(rows), len(self.columns), dtype=dtype)
        for copies, sources, targets in self.column_groups:
            remaining = rows[:, sources].to(work)  # (rows, N)
            for copy in range(copies):
                left = copies - copy
                share = remaining / left
                if noise_std and left > 1:
                    std = noise_std / copies * math.sqrt(copies * (left - 1) / ((copies - 1) * left))
                    share = share.add_(torch.randn(share.shape, generator=generator), alpha=std)
                share = share.to(dtype)
                grown[:, targets[:, copy]] = share
                if left > 1:
                    remaining = remaining.sub_(share)
        return grown


Rule = ZeroRule | VectorRule | MatrixRule


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of rows with about `BLOCK_ELEMENTS` elements; they depend on nothing but the shape."""
    step = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def root_mean_square(source: TensorSource, name: str) -> float:
    """Root mean square of a tensor, summed in an order that does not depend on the number of threads."""
    shape = source.shape(name)
    total = 0.0
    for start, stop in row_blocks(shape):
        rows = source.rows(name, start, stop)
        values = rows.to(torch.promote_types(rows.dtype, torch.float32)).numpy()
        total += float(np.square(values).sum(dtype=np.float64))
    return math.sqrt(total / math.prod(shape))


def growth_rules(growth: Growth, target: Motif2Config) -> dict[str, Rule]:
    """The rule of every tensor of the grown checkpoint.

    Args:
        growth: what grows.
        target: configuration of the grown model.

    Returns:
        dict: rules by tensor name, in the order of `tensor_shapes(target)`.
    """
    source, width = growth.source, growth.width
    hidden = torch.arange(source.hidden_size).repeat(width)
    inner = torch.arange(source.intermediate_size).repeat(width)
    dim = source.head_dim
    query_rows = expand_heads(query_head_map(source.num_groups, growth.source_ratio, growth.ratio), dim)
    output_columns = expand_heads(output_head_map(source.num_groups, growth.source_ratio, growth.ratio), 2 * dim)
    kv_rows = torch.arange(source.num_key_value_heads * dim)
    maps = {
        "q_proj": (query_rows, hidden),
        "k_proj": (kv_rows, hidden),
        "v_proj": (kv_rows, hidden),
        "o_proj": (hidden, output_columns),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    shapes = tensor_shapes(target)
    vocabulary = torch.arange(source.vocab_size)
    embedding = "model.embed_tokens.weight"
    rules: dict[str, Rule] = {}
    for name, shape in shapes.items():
        if name == embedding:
            rules[name] = MatrixRule(shape, name, vocabulary, hidden, divide=False)
        elif name == "lm_head.weight":
            parent = embedding if source.tie_word_embeddings else name
            rules[name] = MatrixRule(shape, parent, vocabulary, hidden, divide=True)
        elif name == "model.norm.weight":
            rules[name] = VectorRule(shape, (name,), partial(_take, index=hidden))
        else:
            rules[name] = _layer_rule(growth, name, shape, maps)
    return rules


def _layer_rule(growth: Growth, name: str, shape: tuple[int, ...], maps: dict) -> Rule:
    """The rule of one tensor of a block, `model.layers.<index>.<rest>`."""
    _, _, index, rest = name.split(".", 3)
    block = growth.blocks[int(index)]
    prefix = f"model.layers.{block.source}."
    module = rest.removesuffix(".weight").split(".")[-1]
    if module in ("o_proj", "down_proj") and block.inserted:
        return ZeroRule(shape)
    if module in maps:
        rows, columns = maps[module]
        return MatrixRule(shape, prefix + rest, rows, columns, True, growth.noise_snr_db, growth.seed)
    if module.endswith("layernorm"):
        return VectorRule(shape, (prefix + rest,), partial(_take, index=maps["o_proj"][0]))
    old, new = lambda_init(block.source), lambda_init(int(index))
    if module == "subln":
        return VectorRule(shape, (prefix + rest,), partial(torch.mul, other=(1 - old) / (1 - new)))
    if module in ("lambda_q2", "lambda_k2"):
        pair = tuple(f"{prefix}self_attn.lambda_{vector}" for vector in ("q2", "k2"))
        return VectorRule(shape, pair, partial(_compensated_vector, shift=new - old, vector=module))
    return VectorRule(shape, (prefix + rest,), torch.clone)


def _take(vector: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return vector[index]


def _compensated_vector(query: torch.Tensor, key: torch.Tensor, shift: float, vector: str) -> torch.Tensor:
    return compensate_lambda(query, key, shift)[0 if vector == "lambda_q2" else 1]


def compensate_lambda(query: torch.Tensor, key: torch.Tensor, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves lambda_q2 and lambda_k2 so that lambda keeps its value although lambda_init grows by `shift`.

    exp(query . key) must grow by `shift` too. The longer vector gives the direction in which the other moves; where
    both vanish there is none, and both are set anew.

    Args:
        query: (D,) float64, lambda_q2.
        key: (D,) float64, lambda_k2.
        shift: new lambda_init minus old, not negative, since a block only moves towards the end.

    Returns:
        The new lambda_q2 and lambda_k2.
    """
    if shift == 0:
        return query, key
    product = torch.dot(query, key)
    wanted = torch.log(torch.exp(product) + shift)
    if max(query.norm(), key.norm()) < SHORTEST_LAMBDA_VECTOR:
        length = torch.sqrt(wanted.abs() / len(query))
        return length.expand(len(query)).clone(), (torch.sign(wanted) * length).expand(len(key)).clone()
    if key.norm() >= query.norm():
        return query + (wanted - product) / torch.dot(key, key) * key, key
    return query, key + (wanted - product) / torch.dot(query, query) * query


def signal_copies(source_ratio: int, ratio: int) -> list[int]:
    """For each signal head of a grown group, the source head it copies: as evenly as the two ratios allow."""
    return [head * source_ratio // ratio for head in range(ratio)]


def query_head_map(num_groups: int, source_ratio: int, ratio: int) -> torch.Tensor:
    """(G * (r + 1),) int64: the source query head of each grown one; a group's noise head stays its last."""
    group = torch.tensor([*signal_copies(source_ratio, ratio), source_ratio])
    return (torch.arange(num_groups)[:, None] * (source_ratio + 1) + group).flatten()


def output_head_map(num_groups: int, source_ratio: int, ratio: int) -> torch.Tensor:
    """(G * r,) int64: the source signal head whose output each grown one repeats."""
    return (
        torch.arange(num_groups)[:, None] * source_ratio + torch.tensor(signal_copies(source_ratio, ratio))
    ).flatten()


def expand_heads(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Features of whole heads: (heads,) to (heads * size,)."""
    return (heads[:, None] * size + torch.arange(size)).flatten()
