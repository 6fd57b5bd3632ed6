"""One decoding step against the float64 definition: caches, padding, splits, ratios."""

import pytest
import torch

from .conftest import INTERPRETED
from .definition import EPS, OUT_SCALE, causal, definition, in_float64, make, relative_error

pytestmark = pytest.mark.kernels_ci
LIMITS = {torch.float32: 3e-6, torch.float16: 2e-3} | ({} if INTERPRETED else {torch.bfloat16: 1.5e-2})


def assert_decodes(kernel, inputs, first=None, last=None):
    out = kernel.gda_decode(*inputs, out_scale=OUT_SCALE, eps=EPS, first=first, last=last)
    bounds = causal(len(out), 1, inputs.key.shape[1], out.device) if first is None else (first, last)
    want, _ = definition(in_float64(inputs), *bounds)
    assert relative_error(out, want.detach()) <= LIMITS[inputs.key.dtype]
    assert not out.requires_grad
    return out


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("head_first", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("keys", [1, 16, 33, 150])
def test_full_caches(kernel, device, poisoned, keys, head_first, dtype):
    assert_decodes(kernel, make(2, 1, keys, 2, 4, 16, dtype, device, head_first=head_first))


@pytest.mark.parametrize("ratio", range(1, 9))
def test_ratios(kernel, device, poisoned, ratio):
    assert_decodes(kernel, make(1, 1, 70, 2, ratio, 16, torch.float32, device))


@pytest.mark.parametrize("dim", [64, 128])
def test_head_dimensions(kernel, device, poisoned, dim):
    assert_decodes(kernel, make(1, 1, 90, 1, 4, dim, torch.float32, device))


def test_static_caches_with_padding(kernel, device, poisoned):
    inputs = make(4, 1, 160, 2, 4, 16, torch.float32, device, head_first=True)
    with torch.no_grad():
        inputs.key[:, 130:] = inputs.value[:, 130:] = float("nan")  # not written yet
    first = torch.tensor([[0], [7], [100], [129]], dtype=torch.int32, device=device)
    last = torch.full_like(first, 129)
    filled = inputs._replace(key=inputs.key[:, :130], value=inputs.value[:, :130])
    want, _ = definition(in_float64(filled), first, last)
    out = kernel.gda_decode(*inputs, out_scale=OUT_SCALE, eps=EPS, first=first, last=last)
    if INTERPRETED or device == "cuda":  # plain torch reads the whole cache
        assert relative_error(out, want.detach()) < 3e-6
    out = kernel.gda_decode(*filled, out_scale=OUT_SCALE, eps=EPS, first=first, last=last)
    assert relative_error(out, want.detach()) < 3e-6


def test_one_length_for_all_rows(kernel, device, poisoned):
    inputs = make(3, 1, 80, 1, 2, 16, torch.float32, device)
    bound = torch.tensor([[52]], dtype=torch.int32, device=device)
    assert_decodes(kernel, inputs, torch.zeros_like(bound), bound)


def test_a_row_that_sees_nothing_gives_zeros(kernel, device, poisoned):
    inputs = make(2, 1, 40, 1, 2, 16, torch.float32, device)
    first = torch.tensor([[0], [30]], dtype=torch.int32, device=device)
    out = assert_decodes(kernel, inputs, first, torch.full_like(first, 20))
    assert not out[1].any()


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_splits_agree(kernel, device, poisoned, splits):
    launch = kernel.ops.launch
    if launch is None or not (INTERPRETED or device == "cuda"):
        pytest.skip("only the Triton kernels split")
    inputs = [each.detach() for each in make(1, 1, 100, 2, 2, 16, torch.float32, device)]
    out = launch.decode(*inputs, None, None, 0.25, EPS, OUT_SCALE, splits=splits)
    torch.testing.assert_close(out, kernel.gda_decode(*inputs, out_scale=OUT_SCALE, eps=EPS), rtol=1e-5, atol=1e-6)


def test_decoding_is_the_last_query_of_attention(kernel, device):
    inputs = make(2, 40, 40, 2, 4, 16, torch.float32, device)
    whole, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    token = inputs._replace(signal_query=inputs.signal_query[:, -1:], noise_query=inputs.noise_query[:, -1:])
    torch.testing.assert_close(
        kernel.gda_decode(*token, out_scale=OUT_SCALE), whole[:, -1:].detach(), rtol=1e-4, atol=1e-5
    )


def test_more_than_one_token_is_refused(kernel, device):
    with pytest.raises(ValueError, match="one token a row, got 2"):
        kernel.gda_decode(*make(1, 2, 9, 1, 2, 16, torch.float32, device), out_scale=OUT_SCALE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
def test_a_captured_step_follows_the_length_on_the_device(kernel, device):
    inputs = [each.detach() for each in make(2, 1, 4096, 8, 4, 128, torch.bfloat16, device)]
    first, last = (torch.full((1, 1), value, dtype=torch.int32, device=device) for value in (0, 100))

    def step():
        return kernel.gda_decode(*inputs, out_scale=OUT_SCALE, first=first, last=last)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for length in (101, 3000):
        last.fill_(length)
        graph.replay()
        torch.testing.assert_close(out, step(), rtol=0, atol=0)
