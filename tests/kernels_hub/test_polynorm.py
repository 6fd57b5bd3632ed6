"""PolyNorm over ranks that hold a part of every row each: values, gradients and what is sent."""

import pytest
import torch
import torch.distributed as dist

import kernels_hub
from tests.distributed import run_distributed


def _polynorm_inputs():
    generator = torch.Generator().manual_seed(1)
    x, up, dy = (torch.randn(3, 4, 24, generator=generator, dtype=torch.float64) for _ in range(3))
    weight = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    return x, up, dy, weight, torch.tensor([0.05], dtype=torch.float64)


def _values_and_gradients(function, leaves, dy):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.distributed
@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
def test_rows_split_over_ranks(mul):
    kernel = kernels_hub.load_local("polynorm")
    x, up, dy, weight, bias = _polynorm_inputs()
    name = "poly_norm_mul" if mul else "poly_norm"
    sharded, whole = getattr(kernel.tensor_parallel, name), getattr(kernel, name)
    leaves = [x, up, weight, bias] if mul else [x, weight, bias]
    num_split = 1 + mul

    def on_rank(rank):
        messages = []
        reduce = dist._functional_collectives.all_reduce

        def counted(tensor, *arguments):
            messages.append(tensor.shape)
            return reduce(tensor, *arguments)

        dist._functional_collectives.all_reduce = counted
        own = [leaf.chunk(2, -1)[rank].contiguous() if i < num_split else leaf for i, leaf in enumerate(leaves)]
        own_dy = dy.chunk(2, -1)[rank].contiguous()
        return _values_and_gradients(lambda *a: sharded(*a, group=dist.group.WORLD), own, own_dy), messages

    (first, messages), (second, _) = run_distributed(on_rank, 2)
    want = _values_and_gradients(whole, leaves, dy)
    for index, expected in enumerate(want):
        if index <= num_split:
            torch.testing.assert_close(torch.cat([first[index], second[index]], -1), expected)
        else:
            torch.testing.assert_close(first[index], expected)
            assert torch.equal(first[index], second[index])
    assert messages == [(3, 4, 3), (3, 4, 4)]


@pytest.mark.distributed
def test_double_backward_of_split_rows_says_no():
    kernel = kernels_hub.load_local("polynorm")
    x, up, _, weight, bias = _polynorm_inputs()

    def on_rank(rank):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, up, weight, bias)]
        y = kernel.tensor_parallel.poly_norm_mul(*leaves, group=dist.group.WORLD)
        messages = []
        for gradient in torch.autograd.grad(y.sum(), leaves, create_graph=True):
            with pytest.raises(NotImplementedError, match="no double backward"):
                gradient.sum().backward(retain_graph=True)
            messages.append(rank)
        return messages

    assert run_distributed(on_rank, 2) == [[0] * 4, [1] * 4]
