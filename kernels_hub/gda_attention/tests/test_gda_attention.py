"""The kernels against a float64 reference written from the definition: values, gradients, masks, compilation."""

import pytest
import torch

from .checks import LIMITS, ON_GPU, assert_matches, padded, uneven, values_and_gradients
from .conftest import INTERPRETED
from .definition import EPS, OUT_SCALE, in_float64, make, relative_error

pytestmark = pytest.mark.kernels_ci


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("head_first", [False, True], ids=["tokens first", "heads first"])
def test_values_and_gradients(kernel, device, poisoned, dtype, head_first):
    assert_matches(kernel, make(2, 37, 37, 2, 2, 16, dtype, device, head_first=head_first))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("window", [None, 5], ids=["causal", "window"])
def test_two_tiles_of_sixteen(kernel, device, poisoned, dtype, window):
    """Small enough for the interpreter: a whole tile and a part of one, heads that lie apart."""
    last = torch.arange(19, dtype=torch.int32, device=device)[None]
    bounds = (None, None) if window is None else ((last - window + 1).clamp(min=0), last)
    assert_matches(kernel, make(1, 19, 19, 2, 2, 16, dtype, device, head_first=True), *bounds)


@pytest.mark.parametrize("ratio", range(1, 9))
def test_ratios(kernel, device, poisoned, ratio):
    assert_matches(kernel, make(1, 19, 19, 1, ratio, 16, torch.float32, device, seed=ratio))


@pytest.mark.parametrize("dim", [64, 128])
def test_head_dimensions(kernel, device, poisoned, dim):
    assert_matches(kernel, make(1, 33, 33, 1, 2, dim, torch.float32, device))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 65])
def test_lengths(kernel, device, poisoned, tokens):
    assert_matches(kernel, make(2, tokens, tokens, 1, 2, 16, torch.float32, device))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [127, 128, 129, 255, 511, 1000, 1024, 2047, 2048, 2049])
@pytest.mark.parametrize("dim", [64, 128] if ON_GPU else [16])
def test_long_lengths(kernel, device, poisoned, tokens, dim):
    assert_matches(kernel, make(1, tokens, tokens, 1, 2, dim, torch.float32, device), limit=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="the tiles that a GPU takes")
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("tokens", [1, 100, 128, 700, 2049])
@pytest.mark.parametrize(
    ("dtype", "dim", "ratio"),
    [(torch.bfloat16, 128, 4), (torch.bfloat16, 64, 1), (torch.float16, 64, 5), (torch.float16, 128, 8)],
    ids=str,
)
def test_half_precision_on_a_gpu(kernel, device, poisoned, dtype, dim, ratio, tokens, packed):
    inputs = make(2, tokens, tokens, 2, ratio, dim, dtype, device)
    bounds = (None, None)
    if packed:
        ends = torch.tensor([0, tokens // 3, tokens // 3 + 1, tokens], device=device)
        bounds = kernel.packed_intervals(ends, tokens)
    assert_matches(kernel, inputs, *bounds)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 40), (5, 40), (20, 37), (9, 4)])
def test_fewer_or_more_queries_than_keys(kernel, device, poisoned, tokens, keys):
    assert_matches(kernel, make(2, tokens, keys, 2, 2, 16, torch.float32, device))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(kernel, device, poisoned, side):
    inputs = make(4, 50, 50, 1, 2, 16, torch.float32, device)
    first, last = padded((50, 17, 1, 0), 50, side, device)
    assert_matches(kernel, inputs, first, last)
    out, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE, first=first, last=last)
    assert not out[first > last].any()


@pytest.mark.parametrize("lengths", [(5, 11, 1, 30, 3), (16, 16, 16), (1,) * 20, (49,)], ids=str)
def test_packs(kernel, device, poisoned, lengths):
    tokens = sum(lengths)
    cumulative = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    inputs = make(1, tokens, tokens, 2, 2, 16, torch.float32, device)
    first, last = kernel.packed_intervals(cumulative, tokens)
    assert_matches(kernel, inputs, first, last)
    out, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE, first=first, last=last)
    start, end = int(cumulative[-2]), tokens
    alone = [each[:, start:end] if each.dim() > 2 else each for each in inputs]
    expected, _ = kernel.gda_attention(*alone, out_scale=OUT_SCALE)
    torch.testing.assert_close(out[:, start:end], expected)


def test_packs_that_differ_by_row(kernel, device, poisoned):
    bounds = [kernel.packed_intervals(torch.tensor([0, *ends], device=device), 40) for ends in ((7, 40), (20, 21, 33))]
    first, last = (torch.cat(each) for each in zip(*bounds, strict=True))
    assert first[1].tolist()[33:] == list(range(33, 40))
    assert_matches(kernel, make(2, 40, 40, 1, 2, 16, torch.float32, device), first, last)


@pytest.mark.parametrize("window", [1, 5, 20])
def test_windows(kernel, device, poisoned, window):
    last = torch.arange(45, dtype=torch.int32, device=device)[None]
    first = (last - window + 1).clamp(min=0)
    assert_matches(kernel, make(2, 45, 45, 1, 2, 16, torch.float32, device), first, last)


def test_a_cache_of_which_a_part_is_filled(kernel, device, poisoned):
    inputs = make(2, 6, 40, 1, 3, 16, torch.float32, device)
    last = torch.arange(20, 26, dtype=torch.int32, device=device)[None]
    assert_matches(kernel, inputs, torch.zeros_like(last), last)


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="the backward in plain torch keeps no maps")
@pytest.mark.parametrize("rows", [1, 2, 40], ids="{} rows of blocks".format)
@pytest.mark.parametrize("case", ["causal", "more keys", "padded"])
def test_a_backward_in_parts(kernel, device, poisoned, monkeypatch, case, rows):
    keys = 75 if case == "more keys" else 70
    inputs = make(2, 70, keys, 1, 2, 16, torch.float32, device)
    edge = kernel.ops.launch.plan(16, 4, inputs.key.device).query.queries
    row_of_blocks = -(-keys // edge) * edge * edge * 3 * 4
    monkeypatch.setattr(kernel.ops.launch, "SCRATCH_BYTES", rows * row_of_blocks)
    bounds = padded((70, 33), 70, "left", device) if case == "padded" else (None, None)
    assert_matches(kernel, inputs, *bounds)


def read_by(kernel, monkeypatch, descriptors):
    """Lets both passes of the backward read through tensor descriptors wherever they can, or neither."""
    launch, plan = kernel.ops.launch, kernel.ops.launch.plan

    def changed(*arguments):
        tiles = plan(*arguments)
        passes = {name: getattr(tiles, name)._replace(descriptors=descriptors) for name in ("query", "value")}
        return tiles._replace(**passes)

    monkeypatch.setattr(launch, "plan", changed)


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="plain torch reads no tiles")
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("case", ["causal", "padded", "more keys"])
def test_reads_of_both_kinds(kernel, device, poisoned, monkeypatch, case, descriptors):
    read_by(kernel, monkeypatch, descriptors)
    rows = 2 if case == "padded" else 1
    inputs = make(rows, 19, 21 if case == "more keys" else 19, 2, 2, 16, torch.float32, device, head_first=True)
    assert_matches(kernel, inputs, *(padded((19, 10), 19, "left", device) if case == "padded" else (None, None)))


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="plain torch reads no tiles")
def test_what_no_descriptor_takes_is_read_by_pointers(kernel, device, poisoned, monkeypatch):
    read_by(kernel, monkeypatch, True)
    inputs = make(1, 19, 19, 1, 2, 16, torch.float16, device)
    changed = inputs._replace(
        **{name: uneven(getattr(inputs, name)) for name in ("signal_query", "noise_query", "key", "value")}
    )
    launch = kernel.ops.launch
    assert launch.passes.describable(*inputs[:4])
    assert not any(launch.passes.describable(each) for each in changed[:4])
    assert_matches(kernel, changed)


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="plain torch has no parts")
@pytest.mark.parametrize("triangular", [True, False])
@pytest.mark.parametrize("together", [1, 100])
@pytest.mark.parametrize("limit", [1, 5, 6, 27, 40, 1000])
def test_parts_cover_every_block_once(kernel, triangular, together, limit):
    groups, rows, columns = 5, 6, 7
    seen = []
    for part in kernel.ops.launch.parts(groups, rows, columns, triangular, together, limit):
        here = range(part.first_block, part.first_block + part.blocks)
        assert part.size == sum(row + 1 if triangular else columns for row in here)
        assert part.size <= limit or part.groups == part.blocks == 1
        assert part.groups == 1 or part.groups * part.size <= together
        seen += [(part.first_group + group, row) for group in range(part.groups) for row in here]
    assert sorted(seen) == [(group, row) for group in range(groups) for row in range(rows)]


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_sharp_maps(kernel, device, poisoned, scale):
    inputs = make(1, 40, 40, 1, 2, 16, torch.float32, device)
    with torch.no_grad():
        inputs.signal_query.mul_(scale)
        inputs.noise_query.mul_(scale)
    # Gradients of nearly one-hot maps are small rests of larger terms.
    assert_matches(kernel, inputs, limit=3e-6 if scale < 1 else 1e-4)


def test_inference_gives_the_same_and_keeps_less(kernel, device, poisoned):
    inputs = make(2, 37, 37, 2, 2, 16, torch.float32, device)
    out, largest = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    with torch.no_grad():
        alone, alone_largest = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    assert torch.equal(out, alone)
    assert torch.equal(largest, alone_largest)
    with torch.no_grad():
        assert kernel.ops._forward(*inputs, None, None, 0.25, EPS, OUT_SCALE, False, "own", "own")[1].shape[2] == 2
    with pytest.raises(RuntimeError, match="not kept"):
        kernel.gda_attention(*inputs, out_scale=OUT_SCALE, training=False)


def test_two_runs_are_equal(kernel, device):
    inputs = make(2, 50, 50, 2, 3, 16, torch.float16, device)
    dout = torch.randn(2, 50, 2, 3, 32, device=device).half()
    runs = [
        values_and_gradients(lambda leaves: kernel.gda_attention(*leaves, out_scale=OUT_SCALE), inputs, dout)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))
    assert [each.dtype for each in runs[0][0]] == [torch.float16] * 5 + [torch.float32] * 2


def test_nan_stays_in_its_row(kernel, device):
    inputs = make(3, 20, 20, 2, 2, 16, torch.float32, device)
    with torch.no_grad():
        inputs.value[1, 0] = float("nan")
    out, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5)])
def test_empty(kernel, device, shape):
    inputs = make(*shape, 2, 2, 16, torch.float32, device)
    out, max_logits = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    assert out.shape == (*shape[:2], 2, 2, 32)
    assert (max_logits == -torch.inf).all()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_torch_checks_the_operators(kernel, device):
    inputs = make(1, 18, 18, 1, 2, 16, torch.float32, device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = (*inputs, None, None, 0.25, EPS, OUT_SCALE, True, "own", "own")
    torch.library.opcheck(kernel.ops._forward, arguments, test_utils=checks)
    arguments = (*(each.detach() for each in inputs), None, None, 0.25, EPS, OUT_SCALE, False, "own", "own")
    torch.library.opcheck(kernel.ops._forward, arguments, test_utils=("test_schema", "test_faketensor"))
    token = [each[:, :1].detach() if index < 2 else each.detach() for index, each in enumerate(inputs)]
    torch.library.opcheck(
        kernel.ops._decode, (*token, None, None, 0.25, EPS, OUT_SCALE), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.skipif(INTERPRETED, reason="the compiled graph calls the same operators")
def test_compile_without_a_break(kernel, device):
    def step(*leaves):
        out, max_logits = kernel.gda_attention(*leaves, out_scale=OUT_SCALE)
        return out.square(), max_logits

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (9, 21):
        inputs = make(2, tokens, tokens, 2, 2, 16, torch.float32, device)
        (out, largest), (want, want_largest) = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(largest, want_largest)
        gradients = torch.autograd.grad(out.sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(want.sum(), inputs))


def test_double_backward_says_no(kernel, device):
    inputs = make(1, 5, 5, 1, 1, 16, torch.float32, device)
    out, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs.key, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_query": torch.zeros(1, 5, 2, 16)}, r"noise_query must be \(1, 5, 1, 16\)"),
        ({"value": torch.zeros(1, 4, 1, 2, 16)}, r"value must be .* and 5 keys"),
        ({"weight": torch.ones(16)}, r"weight must be \(32,\)"),
        ({"lambda_": torch.zeros(2)}, "one number"),
        ({"key": torch.zeros(1, 5, 1, 2, 16).half()}, "must have one type"),
        ({"first": torch.zeros(1, 5)}, "both first and last"),
        ({"first": torch.zeros(1, 4), "last": torch.zeros(1, 4)}, r"first must be \(1 or 1, 5\)"),
        ({"signal_query": torch.zeros(1, 5, 1, 16, 16)}, "from 1 to 15"),
        ({"backward": "fast"}, "backward is 'fast'"),
        ({"forward": "fast"}, "forward is 'fast'"),
        ({"backward": "flash"}, "flash needs causal order"),
        ({"forward": "flash"}, "flash needs causal order"),
    ],
)
def test_wrong_inputs_are_named(kernel, change, message):
    arguments = make(1, 5, 5, 1, 2, 16, torch.float32, "cpu")._asdict() | change
    with pytest.raises(ValueError, match=message):
        kernel.gda_attention(**arguments, out_scale=OUT_SCALE)


def test_rows_too_long_for_32_bits_are_refused(kernel, monkeypatch):
    monkeypatch.setattr(kernel.ops, "_implementation", lambda _: kernel.ops.launch)
    whole = torch.empty(1, 2**20, 4, 2, 128, dtype=torch.float16, device="meta")
    arguments = (whole, whole[:, :, :, 0], whole, whole, torch.empty(()), torch.empty(256), None, None)
    with pytest.raises(ValueError, match="counts to 2"):
        kernel.ops._check(*arguments)
    kernel.ops._check(*(each[:, : 2**18] if each.dim() > 2 else each for each in arguments[:6]), None, None)


def test_autocast_changes_nothing(kernel, device):
    inputs = make(1, 9, 9, 1, 2, 16, torch.float32, device)
    dout = torch.randn(1, 9, 1, 2, 32, device=device)
    wanted, _ = values_and_gradients(lambda leaves: kernel.gda_attention(*leaves, out_scale=OUT_SCALE), inputs, dout)
    with torch.autocast(device, torch.bfloat16):
        found, _ = values_and_gradients(
            lambda leaves: kernel.gda_attention(*leaves, out_scale=OUT_SCALE), inputs, dout
        )
        token = [each[:, :1] if index < 2 else each for index, each in enumerate(inputs)]
        assert kernel.gda_decode(*token, out_scale=OUT_SCALE).dtype == torch.float32
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_the_reference_is_exact_in_float64(kernel):
    if INTERPRETED or ON_GPU:
        pytest.skip("runs where the operators are plain torch")
    for first, last in ((None, None), padded((11, 4), 11, "left", "cpu")):
        inputs = in_float64(make(2, 11, 11, 2, 3, 8, torch.float64, "cpu"))
        assert_matches(kernel, inputs, first, last, limit=1e-12)


def test_what_is_supported(kernel, device):
    assert kernel.supports(128, torch.bfloat16, 4, torch.device(device))
    assert not kernel.supports(128, torch.bfloat16, 16, torch.device(device))
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
