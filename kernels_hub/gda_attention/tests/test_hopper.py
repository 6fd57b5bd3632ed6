"""Whose passes run, Gluon's or Triton's: on Hopper, outside of it, and where Gluon's fail."""

import warnings
from collections import defaultdict

import pytest
import torch

from .checks import ON_GPU, assert_matches, padded, uneven, values_and_gradients
from .conftest import INTERPRETED
from .definition import OUT_SCALE, make, relative_error

pytestmark = pytest.mark.kernels_ci

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
