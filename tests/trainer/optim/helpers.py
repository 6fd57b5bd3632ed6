"""A small model to optimise in any layout: matrices of awkward shapes, a vector, and an attention to clip."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

HEAD_DIM, NUM_GROUPS, NUM_SIGNAL_HEADS = 3, 2, 2
NUM_HEADS = NUM_GROUPS * (NUM_SIGNAL_HEADS + 1)
SHAPES = {
    "q_proj": (NUM_HEADS * HEAD_DIM, 5),
    "k_proj": (2 * NUM_GROUPS * HEAD_DIM, 5),
    "gate": (16, 6),
    "down": (6, 16),
    "odd": (7, 4),
    "short": (3, 8),
    "vector": (9,),
}
MAX_LOGITS = torch.tensor([150.0, 30.0, 400.0, 99.0, 100.5, 7.0])


class Bag(nn.Module):
    """Parameters whose gradients are whatever is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        super().__init__()
        for name, value in full_tensors(seed, dtype).items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        total = 0.0
        for name, parameter in self.named_parameters():
            if name in gradients:
                gradient = gradients[name].to(parameter.device)
                if isinstance(parameter, DTensor):
                    gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
                product = (parameter * gradient).sum()
                total = total + (product.full_tensor() if isinstance(product, DTensor) else product)
        return total


def full_tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A full tensor for each name, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def distribute(bag: Bag, mesh, placements_of) -> None:
    """Replace each parameter by a DTensor with `placements_of(tensor)` on `mesh`."""
    for name, parameter in list(bag.named_parameters()):
        sharded = distribute_tensor(parameter.detach(), mesh, placements_of(parameter))
        setattr(bag, name, nn.Parameter(sharded))


def shard_fully(bag: Bag, mesh, **options) -> None:
    """FSDP2 (or HSDP on a two-dimensional mesh)."""
    fully_shard(bag, mesh=mesh, **options)


def attention_of(bag: Bag, rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """What the optimizer reads of an attention module; each rank saw the maxima of some of the heads."""
    seen = torch.arange(NUM_HEADS) % world_size == rank
    return SimpleNamespace(
        q_proj=SimpleNamespace(weight=bag.q_proj),
        k_proj=SimpleNamespace(weight=bag.k_proj),
        num_groups=NUM_GROUPS,
        num_signal_heads_per_group=NUM_SIGNAL_HEADS,
        head_dim=HEAD_DIM,
        max_logits=torch.where(seen, MAX_LOGITS, -torch.inf).to(bag.vector.device),
    )


def groups_of(bag: Bag) -> list[dict]:
    """Muon for the matrices, AdamW with a rate and a decay of its own for the vector."""
    matrices = [parameter for name, parameter in bag.named_parameters() if name != "vector"]
    return [{"params": matrices}, {"params": [bag.vector], "algorithm": "adamw", "lr": 0.03, "weight_decay": 0.2}]


def set_gradients(bag: Bag, seed: int, names=tuple(SHAPES)) -> None:
    """Give the named parameters the full gradient of `seed` through a backward pass."""
    dtype = bag.vector.dtype
    gradients = {name: value for name, value in full_tensors(seed, dtype).items() if name in names}
    bag.zero_grad()
    bag(gradients).backward()


def train(bag: Bag, optimizer, attention=None, steps: int = 3, first: int = 1) -> dict[str, torch.Tensor]:
    """Take steps with seeded gradients; the attention sees the same maxima in each."""
    logits = None if attention is None else attention.max_logits.clone()
    for step in range(first, first + steps):
        set_gradients(bag, step)
        if attention is not None:
            attention.max_logits = logits.clone()
        optimizer.step()
    return full_parameters(bag)


def full_parameters(bag: Bag) -> dict[str, torch.Tensor]:
    """Every parameter in full."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in bag.named_parameters()
    }
