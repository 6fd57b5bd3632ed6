"""The kernels against a float64 reference written from the definition: values, gradients, masks, compilation."""

import warnings
from collections import defaultdict

import pytest
import torch

from .conftest import INTERPRETED
from .definition import EPS, OUT_SCALE, causal, definition, in_float64, make, relative_error

pytestmark = pytest.mark.kernels_ci

# Relative error of the whole tensor. The interpreter multiplies bfloat16 wrongly: it is tested on a GPU and in torch.
LIMITS = {torch.float32: 3e-6, torch.float16: 2e-3} | ({} if INTERPRETED else {torch.bfloat16: 1.5e-2})
NAMES = ("out", "signal_query", "noise_query", "key", "value", "lambda_", "weight")
ON_GPU = torch.cuda.is_available()


def values_and_gradients(function, inputs, dout):
    out, max_logits = function(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)], max_logits


def assert_matches(kernel, inputs, first=None, last=None, limit=None):
    """Value, all gradients and the largest logits against the definition in float64."""
    device, dtype = inputs.key.device, inputs.key.dtype
    limit = LIMITS[dtype] if limit is None else limit
    batch, tokens, keys = *inputs.signal_query.shape[:2], inputs.key.shape[1]

    def ours(leaves):
        return kernel.gda_attention(*leaves, out_scale=OUT_SCALE, eps=EPS, first=first, last=last)

    bounds = causal(batch, tokens, keys, device) if first is None else (first, last)
    generator = torch.Generator().manual_seed(tokens)
    shape = (*inputs.signal_query.shape[:-1], 2 * inputs.key.shape[-1])
    dout = torch.randn(shape, generator=generator).to(device, dtype)
    got, max_logits = values_and_gradients(ours, inputs, dout)
    want, largest = values_and_gradients(lambda leaves: definition(leaves, *bounds), in_float64(inputs), dout.double())
    for name, one, other in zip(NAMES, got, want, strict=True):
        # lambda's gradient is one number left of many terms, which are those of the value's gradient; the gradients of
        # queries and keys vanish where every query sees one key.
        scale = want[NAMES.index("value")].norm()
        size = other.norm() if other.any() and name != "lambda_" else torch.maximum(other.norm(), scale)
        assert torch.isfinite(one).all(), f"{name} is not finite"
        error = float((one.double() - other).norm() / size) if size > 0 else float(one.double().norm())
        # Gradients are what is left of larger terms, the more so the fewer keys a query sees.
        assert error <= (limit if name == "out" else 4 * limit), f"{name}: relative error {error:.1e}"
    limit = max(limit, 1e-6)  # they are float32 always
    torch.testing.assert_close(max_logits.cpu().double(), largest, rtol=limit, atol=limit)


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
    [(torch.bfloat16, 128, 4), (torch.bfloat16, 64, 1), (torch.float16, 128, 8)],
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


def padded(batch_lengths, width, side, device):
    """Intervals of rows with padding; a padding query sees nothing."""
    index = torch.arange(width, dtype=torch.int32, device=device)
    firsts, lasts = [], []
    for length in batch_lengths:
        start = width - length if side == "left" else 0
        valid = (index >= start) & (index < start + length)
        firsts.append(torch.where(valid, start, index + 1) if side == "right" else torch.full_like(index, start))
        lasts.append(index)
    return torch.stack(firsts).int(), torch.stack(lasts).int()


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


ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def launches(kernel, monkeypatch):
    """Whose forward was launched and whose passes, in order."""
    made, launch = [], kernel.ops.launch

    def noted(module, function, name):
        original = getattr(module, function)

        def call(*arguments):
            made.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, function, call)

    noted(launch, "_forward", "Triton's forward")
    noted(launch.hopper_passes, "forward", "Gluon's forward")
    noted(launch.passes.Passes, "value_sum", "Triton's passes")
    noted(launch.hopper_passes.Passes, "value_sum", "Gluon's passes")
    return made


TRITON, GLUON = (["Triton's forward", "Triton's passes"], ["Gluon's forward", "Gluon's passes"])


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
@pytest.mark.parametrize("by_hand", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize("views", [False, True], ids=["tensors", "views of one projection"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "ratio"), [(1, 2), (65, 4), (128, 1), (1357, 4), (2049, 3)])
def test_passes_for_hopper(kernel, device, poisoned, launches, monkeypatch, dtype, tokens, ratio, views, by_hand):
    if not by_hand:
        monkeypatch.setattr(kernel.ops.launch.hopper_passes, "suits", lambda *_: False)
    inputs = make(2, tokens, tokens, 2, ratio, 128, dtype, device)
    if views:
        joined = torch.cat((inputs.signal_query, inputs.noise_query[:, :, :, None]), dim=3).detach()
        signal, noise = joined[:, :, :, :-1], joined[:, :, :, -1]
        inputs = inputs._replace(signal_query=signal.requires_grad_(), noise_query=noise.requires_grad_())
    assert_matches(kernel, inputs)
    assert launches == (GLUON if by_hand else TRITON)


def intervals_on_hopper(kernel, case, tokens, device):
    """First and last visible key of two rows."""
    if "padded" in case:
        return padded((tokens, tokens // 3), tokens, case.split()[1], device)
    if case == "window":
        last = torch.arange(tokens, dtype=torch.int32, device=device)[None]
        return (last - 99).clamp(min=0), last
    ends = [list(range(50, tokens, 50)), [1, 2, 3, tokens - 40]] if case == "many documents" else [[tokens // 3], []]
    bounds = [kernel.packed_intervals(torch.tensor([0, *each, tokens], device=device), tokens) for each in ends]
    return [torch.cat(each) for each in zip(*bounds, strict=True)]


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
@pytest.mark.parametrize("rows", [None, 1, 3], ids=lambda rows: f"{rows or 'all'} rows of blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["padded left", "padded right", "window", "documents", "many documents"])
@pytest.mark.parametrize(("tokens", "ratio"), [(65, 1), (128, 4), (850, 3)])
def test_intervals_on_hopper(kernel, device, poisoned, launches, monkeypatch, case, dtype, tokens, ratio, rows):
    if rows:
        monkeypatch.setattr(kernel.ops.launch, "SCRATCH_BYTES", rows * 7 * 128 * 128 * (ratio + 1) * 2)
    inputs = make(2, tokens, tokens, 2, ratio, 128, dtype, device)
    first, last = intervals_on_hopper(kernel, case, tokens, device)
    assert_matches(kernel, inputs, first, last)
    assert launches == GLUON
    with torch.no_grad():
        out, _ = kernel.gda_attention(*inputs, out_scale=OUT_SCALE, first=first, last=last)
    assert not out[(first > last).expand(2, -1)].any()


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
@pytest.mark.parametrize("ratio", range(1, 9))
def test_ratios_on_hopper(kernel, device, poisoned, launches, ratio):
    assert_matches(kernel, make(1, 200, 200, 1, ratio, 128, torch.bfloat16, device))
    assert launches == GLUON


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
def test_two_runs_are_equal_on_hopper(kernel, device, launches):
    inputs = make(2, 700, 700, 2, 4, 128, torch.bfloat16, device)
    dout = torch.randn(2, 700, 2, 4, 256, device=device).bfloat16()
    runs = [
        values_and_gradients(lambda leaves: kernel.gda_attention(*leaves, out_scale=OUT_SCALE), inputs, dout)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))
    with torch.no_grad():
        out, largest = kernel.gda_attention(*inputs, out_scale=OUT_SCALE)
    assert relative_error(out, runs[0][0][0]) < 1e-3  # rounded otherwise, here and there
    torch.testing.assert_close(largest, runs[0][1], rtol=1e-6, atol=1e-6)
    assert launches == [*GLUON, *GLUON, GLUON[0]]


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
@pytest.mark.parametrize("rows", [1, 2, 3, 40], ids="{} rows of blocks".format)
@pytest.mark.parametrize("by_hand", [True, False], ids=["gluon", "triton"])
def test_a_backward_in_parts_on_hopper(kernel, device, poisoned, launches, monkeypatch, rows, by_hand):
    launch = kernel.ops.launch
    if not by_hand:
        monkeypatch.setattr(launch.hopper_passes, "suits", lambda *_: False)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", rows * 7 * 128 * 128 * 4 * 2)
    assert_matches(kernel, make(2, 850, 850, 2, 3, 128, torch.bfloat16, device))
    assert launches == (GLUON if by_hand else TRITON)


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
@pytest.mark.parametrize("case", ["more keys", "narrow", "single", "uneven", "heads first"])
def test_other_inputs_go_through_triton_on_hopper(kernel, device, launches, case):
    dim, dtype = 64 if case == "narrow" else 128, torch.float32 if case == "single" else torch.bfloat16
    keys = 160 if case == "more keys" else 150
    inputs = make(2, 150, keys, 2, 2, dim, dtype, device, head_first=case == "heads first")
    if case == "uneven":
        inputs = inputs._replace(key=uneven(inputs.key))
    assert_matches(kernel, inputs)
    assert launches == TRITON


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="plain torch has no launches")
def test_outside_hopper_the_passes_are_tritons(kernel, device, launches):
    assert_matches(kernel, make(1, 17, 17, 1, 2, 16, torch.float32, device))
    assert launches == TRITON


def refuse(*_, **__):
    raise RuntimeError("no such instruction")


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="plain torch has no launches")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_where_kernels_in_gluon_fail_tritons_run(kernel, device, poisoned, launches, monkeypatch, direction):
    """Both directions change over at the first failure, say so once, and do not try again."""
    module = kernel.ops.launch.hopper_passes
    monkeypatch.setattr(module, "usable", True)
    changes = {"suits": lambda *_: True, "forward": refuse, "Passes": refuse}
    if direction == "backward":
        changes["forward"] = lambda *_: None  # Triton's runs
    for name, changed in changes.items():
        monkeypatch.setattr(module, name, changed)
    inputs = make(1, 5, 5, 1, 1, 16, torch.float32, device)
    with pytest.warns(UserWarning, match="Triton's do from now on: RuntimeError: no such instruction") as said:
        assert_matches(kernel, inputs)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches(kernel, inputs)
    assert launches == TRITON * 2


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="plain torch has no launches")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_gluon_is_raised(kernel, monkeypatch, error):
    module = kernel.ops.launch.hopper_passes
    monkeypatch.setattr(module, "usable", True)

    def work():
        raise error

    with pytest.raises(error):
        module.attempt(work)
    assert module.usable


@pytest.mark.skipif(not ON_HOPPER, reason="kernels for Hopper")
@pytest.mark.parametrize("failing", ["forward", "query", "key", "value"])
def test_a_pass_that_fails_on_hopper_leaves_nothing_behind(kernel, device, poisoned, launches, monkeypatch, failing):
    module = kernel.ops.launch.hopper_passes
    monkeypatch.setattr(module, "usable", True)
    source = getattr(module, f"hopper_{failing}")
    monkeypatch.setattr(source, f"{failing}_kernel", defaultdict(lambda: refuse))
    with pytest.warns(UserWarning, match="Triton's do from now on"):
        assert_matches(kernel, make(2, 300, 300, 2, 3, 128, torch.bfloat16, device))
    assert launches[-1] == TRITON[-1]


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


def uneven(tensor):
    """The same values in storage whose rows are one number longer: strides that no descriptor takes."""
    stored = tensor.detach().new_empty((*tensor.shape[:-1], tensor.shape[-1] + 1))
    view = stored[..., :-1]
    view.copy_(tensor.detach())
    return view.requires_grad_()


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
