"""Forward and backward by FlashAttention-4's kernels: on a GPU that has them, else the package's calls in plain torch.

Shapes: B rows, T queries, S keys, H query heads, D head dimension, V width of a value.
"""

import math

import pytest
import torch

from .checks import assert_matches, values_and_gradients
from .definition import EPS, OUT_SCALE, make, relative_error

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TILES = (64, 96)  # queries, keys


def whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def package_kernel(heads_a_key, dim, dtype):
    """What the package's compiled kernel does to its arguments, head by head."""

    def kernel(query, key, value, dout, lse, delta, dquery_sums, dkey, dvalue, scaling):
        batch, tokens, heads, _ = query.shape
        num_keys, width = key.shape[1], value.shape[3]
        rows, columns = whole(tokens, TILES[0]), whole(num_keys, TILES[1])
        assert heads == heads_a_key * key.shape[2]
        assert query.shape[3] == dim
        assert {each.dtype for each in (query, key, value, dout)} == {dtype}
        for each in (query, key, value, dout):
            assert each.stride(-1) == 1
            assert all(stride * each.element_size() % 16 == 0 for stride in each.stride()[:-1])
        assert lse.shape == delta.shape == (batch, heads, rows)
        assert dquery_sums.shape == (batch, heads, rows * dim)
        assert not dquery_sums.any()
        if heads_a_key > 1:
            assert dkey.shape == (batch, key.shape[2], columns * dim)
            assert dvalue.shape == (batch, key.shape[2], columns * width)
            assert not dkey.any()
            assert not dvalue.any()
        order = torch.arange(num_keys) <= torch.arange(tokens)[:, None] + num_keys - tokens
        for head in range(heads):
            place = head // heads_a_key
            q, k, v, g = (
                each[:, :, index].float()
                for each, index in ((query, head), (key, place), (value, place), (dout, head))
            )
            logits = (q @ k.mT * (scaling * math.log2(math.e))).masked_fill(~order, -torch.inf)
            maps = torch.exp2(logits - lse[:, head, :tokens, None])
            dlogits = maps * (g @ v.mT - delta[:, head, :tokens, None])
            dquery_sums[:, head].unflatten(1, (rows, dim))[:, :tokens] += dlogits @ k
            if heads_a_key > 1:
                dkey[:, place].unflatten(1, (columns, dim))[:, :num_keys] += dlogits.mT @ q
                dvalue[:, place].unflatten(1, (columns, width))[:, :num_keys] += maps.mT @ g
            else:
                dkey[:, :, place] = (dlogits.mT @ q * scaling).to(dtype)
                dvalue[:, :, place] = (maps.mT @ g).to(dtype)

    return kernel


def package_conversion(sums, out, factor, of_queries):
    """What the package's conversion does."""
    _, rows, heads, width = out.shape
    tiles = whole(rows, TILES[0] if of_queries else TILES[1])
    assert sums.shape == (out.shape[0], heads, tiles * width)
    out.copy_(factor * sums.unflatten(2, (tiles, width))[:, :, :rows].transpose(1, 2))


def package_forward(query, key, value, scaling, out, lse):
    """What the package's forward does."""
    tokens, heads = query.shape[1:3]
    num_keys, shared = key.shape[1], heads // key.shape[2]
    assert out.shape == (*query.shape[:3], value.shape[3])
    assert lse.shape == (query.shape[0], heads, tokens)
    order = torch.arange(num_keys) <= torch.arange(tokens)[:, None] + num_keys - tokens
    for head in range(heads):
        logits = query[:, :, head].float() @ key[:, :, head // shared].float().mT * scaling
        logits = logits.masked_fill(~order, -torch.inf)
        lse[:, head] = torch.logsumexp(logits, -1)
        out[:, :, head] = (torch.softmax(logits, -1) @ value[:, :, head // shared].float()).to(out.dtype)


@pytest.fixture
def package(kernel, monkeypatch):
    """Lets a machine without Hopper run the package's calls in plain torch."""
    if not ON_HOPPER:
        module = kernel.ops.flash
        monkeypatch.setattr(module, "PACKAGE", "torch")  # which is installed
        monkeypatch.setattr(module, "_fits", lambda *_: True)
        monkeypatch.setattr(module, "_attend", package_forward)
        monkeypatch.setattr(module, "_kernel", package_kernel)
        monkeypatch.setattr(module, "_convert", package_conversion)
    elif not kernel.supports_flash(128, torch.bfloat16, torch.device("cuda")):
        pytest.skip("flash-attn-4 is not installed")


class WithFlash:
    """The kernel of which the package does the forward, the backward or both."""

    def __init__(self, kernel, forward, backward):
        self.kernel, self.ways = kernel, {"forward": forward, "backward": backward}

    def gda_attention(self, *inputs, first=None, last=None, **options):
        out, largest = self.kernel.gda_attention(*inputs, first=first, last=last, **self.ways, **options)
        assert (largest is None) == (self.ways["forward"] == "flash")
        if largest is None:
            with torch.no_grad():
                largest = self.kernel.gda_attention(*inputs, first=first, last=last, **options)[1]
        return out, largest


WAYS = [("own", "flash"), ("flash", "flash"), ("flash", "own")]


@pytest.mark.parametrize(("forward", "backward"), WAYS)
@pytest.mark.parametrize(("tokens", "keys", "ratio"), [(37, 37, 2), (1, 1, 3), (64, 64, 1), (20, 37, 4), (97, 100, 2)])
def test_gradients_are_the_definition(kernel, device, poisoned, package, tokens, keys, ratio, forward, backward):
    dtype, dim = (torch.bfloat16, 128) if ON_HOPPER else (torch.float32, 16)
    inputs = make(2, tokens, keys, 2, ratio, dim, dtype, device)
    assert_matches(WithFlash(kernel, forward, backward), inputs)


@pytest.mark.skipif(not ON_HOPPER, reason="the tiles that a GPU takes")
@pytest.mark.parametrize(("forward", "backward"), WAYS)
@pytest.mark.parametrize("head_first", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "ratio"), [(100, 4), (700, 1), (1357, 4), (2049, 3)])
def test_gradients_on_hopper(kernel, device, package, dtype, tokens, ratio, head_first, forward, backward):
    inputs = make(2, tokens, tokens, 2, ratio, 128, dtype, device, head_first=head_first)
    assert_matches(WithFlash(kernel, forward, backward), inputs)


def toy():
    return (torch.bfloat16, 128) if ON_HOPPER else (torch.float32, 16)


def test_what_is_asked_for_really_runs(kernel, device, package, monkeypatch):
    """Each pass is two launches: the signals', of which two share a key here, and the noise's."""
    module, called = kernel.ops.flash, []
    compiled, attend = module._kernel, module._attend

    def noted_kernel(heads_a_key, dim, dtype):
        called.append(heads_a_key)
        return compiled(heads_a_key, dim, dtype)

    def noted_attend(query, key, *rest):
        called.append(f"forward {query.shape[2] // key.shape[2]}")
        return attend(query, key, *rest)

    monkeypatch.setattr(module, "_kernel", noted_kernel)
    monkeypatch.setattr(module, "_attend", noted_attend)
    dtype, dim = toy()
    inputs = make(1, 9, 9, 1, 2, dim, dtype, device)
    for forward, backward, expected in (
        ("own", "own", []),
        ("own", "flash", [2, 1]),
        ("flash", "own", ["forward 2", "forward 1"]),
    ):
        out, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE, forward=forward, backward=backward)
        out.sum().backward()
        assert called == expected
        called.clear()


def test_inference(kernel, device, package):
    dtype, dim = toy()
    inputs = make(1, 33, 40, 2, 3, dim, dtype, device)
    with torch.no_grad():
        wanted, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
        found, largest = kernel.gda_attention(*inputs, out_scale=OUT_SCALE, forward="flash")
    assert largest is None
    assert relative_error(found, wanted.double()) < (1e-2 if ON_HOPPER else 1e-5)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_what_the_package_does_not_do_is_refused(kernel, device, package, part):
    dtype, dim = toy()
    last = torch.arange(9, dtype=torch.int32, device=device)[None]
    for (tokens, keys), bounds in (((9, 9), {"first": last, "last": last}), ((9, 8), {})):
        inputs = make(1, tokens, keys, 1, 2, dim, dtype, device)
        with pytest.raises(ValueError, match="needs causal order"):
            kernel.gda_attention(*inputs, out_scale=OUT_SCALE, **{part: "flash"}, **bounds)


@pytest.mark.parametrize(("forward", "backward"), [("flash", "flash")])
def test_compiled_code_keeps_the_way(kernel, device, package, forward, backward):
    dtype, dim = toy()
    inputs = make(1, 21, 21, 2, 2, dim, dtype, device)

    def step(leaves):
        return kernel.gda_attention(*leaves, out_scale=OUT_SCALE, eps=EPS, forward=forward, backward=backward)

    dout = torch.randn(1, 21, 2, 2, 2 * dim, device=device).to(dtype)
    wanted, _ = values_and_gradients(step, inputs, dout)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, largest = values_and_gradients(compiled, inputs, dout)
    assert largest is None
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3 if ON_HOPPER else None, atol=1e-3 if ON_HOPPER else None)


@pytest.mark.parametrize("package", ["flash_attn_4_of_nobody", "flash_attn_4_of_nobody.cute"])
def test_without_the_package_it_is_not_offered(kernel, monkeypatch, package):
    module = kernel.ops.flash
    monkeypatch.setattr(module, "_fits", lambda *_: True)
    monkeypatch.setattr(module, "PACKAGE", "torch")
    assert kernel.supports_flash(128, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(module, "PACKAGE", package)
    assert not kernel.supports_flash(128, torch.bfloat16, torch.device("cuda"))


def test_a_package_that_cannot_be_imported_is_none(kernel, monkeypatch, tmp_path):
    (tmp_path / "flash_of_another_version").mkdir()
    (tmp_path / "flash_of_another_version" / "__init__.py").write_text("raise AttributeError('cutlass')")
    monkeypatch.syspath_prepend(tmp_path)
    module = kernel.ops.flash
    monkeypatch.setattr(module, "_fits", lambda *_: True)
    monkeypatch.setattr(module, "PACKAGE", "flash_of_another_version.cute")
    assert not kernel.supports_flash(128, torch.bfloat16, torch.device("cuda"))
