"""The kernels against a float64 reference written from the definition: values, gradients, edge cases, compilation."""

import pytest
import torch

from .conftest import INTERPRETED

pytestmark = pytest.mark.kernels_ci

SHAPES = [(3, 5), (2, 3, 48), (7, 100), (5, 1), (1, 64), (9, 257)] + ([] if INTERPRETED else [(3, 16385), (2, 65536)])
# Triton's interpreter cuts float32 to bfloat16 instead of rounding, which doubles the error.
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 6e-4}
# The interpreter takes milliseconds a program: the whole of this takes it a minute.
slow_if_interpreted = [pytest.mark.slow] if INTERPRETED else []
CASES = [
    pytest.param(
        shape, dtype, marks=slow_if_interpreted if dtype != torch.float32 and shape not in SHAPES[::5] else []
    )
    for shape in SHAPES
    for dtype in LIMITS
]


def definition(x, up, weight, bias, eps=1e-6):
    """PolyNorm as the paper writes it."""

    def norm(z):
        return z / torch.sqrt(z.square().mean(-1, keepdim=True) + eps)

    y = weight[0] * norm(x**3) + weight[1] * norm(x**2) + weight[2] * norm(x) + bias
    return y if up is None else y * up


def run(kernel, x, up, weight, bias):
    return kernel.poly_norm(x, weight, bias) if up is None else kernel.poly_norm_mul(x, up, weight, bias)


def make(shape, dtype, mul, device, parameter_dtype=torch.float32):
    x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    up = torch.randn(shape, device=device, dtype=dtype).requires_grad_() if mul else None
    weight = torch.tensor([0.4, 0.3, 0.3], device=device, dtype=parameter_dtype).requires_grad_()
    bias = torch.tensor([0.05], device=device, dtype=parameter_dtype).requires_grad_()
    return x, up, weight, bias


def values_and_gradients(function, inputs, dy):
    leaves = [leaf for leaf in inputs if leaf is not None]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_matches_definition(kernel, inputs, dy, limit):
    got = values_and_gradients(lambda *a: run(kernel, *a), inputs, dy)
    wide = [None if i is None else i.detach().double().requires_grad_() for i in inputs]
    want = values_and_gradients(definition, wide, dy.double())
    scale = dy.double().norm()
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        # An input gradient may be the small rest of large terms: it is held to the size of those that came in.
        size = other.norm() if index == 0 else torch.maximum(other.norm(), scale)
        error = (one.double() - other).norm() / size
        assert error <= limit, f"output {index}: relative error {error:.1e}"


@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values_and_gradients(kernel, device, poisoned, shape, dtype, mul):
    inputs = make(shape, dtype, mul, device)
    assert_matches_definition(kernel, inputs, torch.randn(shape, device=device, dtype=dtype), LIMITS[dtype])


@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
def test_rows_that_are_read_twice(kernel, device, poisoned, mul, monkeypatch):
    if not INTERPRETED and device == "cpu":
        pytest.skip("only the Triton kernels read rows twice")
    launch = kernel.ops.launch
    monkeypatch.setattr(launch, "plan", lambda *_, **__: launch.Plan(warps=4, programs=1, stages=1, block=32))
    assert_matches_definition(
        kernel, make((5, 75), torch.float32, mul, device), torch.randn(5, 75, device=device), 3e-6
    )


def test_known_values(kernel, device):
    x = torch.tensor([1, -2, 0.5, -0.25], device=device)
    weight, bias = torch.tensor([0.4, 0.3, 0.3], device=device), torch.tensor([0.05], device=device)
    want = torch.tensor([0.554770, -0.683406, 0.228870, -0.007552], device=device)
    torch.testing.assert_close(kernel.poly_norm(x, weight, bias), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e-6, 0.0])
@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
def test_extreme_sizes(kernel, device, poisoned, scale, mul):
    x, up, weight, bias = make((4, 64), torch.float32, mul, device)
    x = (x.detach() * scale).requires_grad_()
    got = values_and_gradients(lambda *a: run(kernel, *a), (x, up, weight, bias), torch.ones(4, 64, device=device))
    wide = [None if i is None else i.detach().double().requires_grad_() for i in (x, up, weight, bias)]
    want = values_and_gradients(definition, wide, torch.ones(4, 64, device=device, dtype=torch.float64))
    for one, other in zip(got, want, strict=True):
        # The gradient of huge inputs is a cancelled rest, far below what comes in (norm 16 over 1e4).
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-5 if scale != 1e4 else 1e-6)


def test_one_huge_element(kernel, device, poisoned):
    inputs = make((4, 64), torch.float32, True, device)
    with torch.no_grad():
        inputs[0][1, 7] = 1e4
    assert_matches_definition(kernel, inputs, torch.randn(4, 64, device=device), 1e-5)


def test_nan_stays_in_its_row(kernel, device):
    x, up, weight, bias = make((4, 64), torch.float32, True, device)
    with torch.no_grad():
        x[2, 5] = float("nan")
    y, dx, dup, dweight, _ = values_and_gradients(
        lambda *a: run(kernel, *a), (x, up, weight, bias), torch.ones_like(x)
    )
    for output in (y, dx, dup):
        assert output[2].isnan().all()
        assert not output[[0, 1, 3]].isnan().any()
    assert dweight.isnan().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(kernel, device, shape):
    inputs = make(shape, torch.float32, True, device)
    y, dx, dup, dweight, dbias = values_and_gradients(lambda *a: run(kernel, *a), inputs, torch.ones_like(inputs[0]))
    assert y.shape == dx.shape == dup.shape == shape
    assert not dweight.any()
    assert not dbias.any()
    assert kernel.poly_norm(inputs[0], *inputs[2:], eps=0.0).shape == shape


@pytest.mark.parametrize("view", ["halves", "transposed", "columns apart", "expanded"])
def test_strides(kernel, device, poisoned, view):
    rows = 2 if INTERPRETED else 6
    base = torch.randn(3, rows, 64, device=device)
    x = {
        "halves": base[..., 32:],
        "transposed": base.transpose(0, 1),
        "columns apart": base[..., ::2],
        "expanded": base[:, :1].expand(3, rows, 64),
    }[view]
    weight, bias = torch.tensor([0.4, 0.3, 0.3], device=device), torch.tensor([0.05], device=device)
    torch.testing.assert_close(
        kernel.poly_norm(x, weight, bias), definition(x, None, weight, bias), rtol=1e-5, atol=1e-6
    )
    leaf = base[..., :32].contiguous().requires_grad_()
    (got,) = torch.autograd.grad(kernel.poly_norm(leaf, weight, bias).sum(), leaf)  # an expanded gradient comes in
    (want,) = torch.autograd.grad(definition(leaf, None, weight, bias).sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_every_tensor_has_strides_of_its_own(kernel, device, poisoned):
    x, up, dy = (torch.randn(3, 2, width, device=device)[..., 3:35] for width in (64, 100, 80))
    weight = torch.tensor([0.4, 9, 0.3, 9, 0.2, 9], device=device)[::2]
    inputs = [i.detach().requires_grad_() for i in (x, up, weight, torch.tensor([0.05], device=device))]
    assert [i.stride(-2) for i in (*inputs[:2], dy)] == [64, 100, 80]
    assert_matches_definition(kernel, inputs, dy, 3e-6)
    assert_matches_definition(kernel, [inputs[0], None, *inputs[2:]], dy, 3e-6)


@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
@pytest.mark.parametrize("shape", [(2, 3, 75), (4, 1), (0, 8)], ids=str)
def test_operators_of_split_rows(kernel, device, poisoned, shape, mul):
    """What tensor parallelism is made of, for rows of which this rank holds half: `count` is twice the columns."""
    *leading, columns = shape
    x, dy, up = (torch.randn(*leading, columns + extra, device=device)[..., :columns] for extra in (3, 5, 9))
    up = up if mul else None
    weight = torch.tensor([0.4, 9, 0.3, 9, 0.2, 9], device=device)[::2]
    bias = torch.tensor([0.05], device=device)
    sums = torch.randn(*leading, 4, device=device)
    inverse_rms = torch.rand(*leading, 3, device=device) + 0.5
    calls = {
        "power_sums": (x,),
        "apply": (x, up, weight, bias, inverse_rms),
        "gradient_sums": (dy, x, up, inverse_rms),
        "input_gradients": (dy, x, up, weight, bias, inverse_rms, sums, 2 * columns),
    }
    for name, arguments in calls.items():
        got = getattr(kernel.ops, name)(*arguments)
        wide = [argument.double() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        want = getattr(kernel.reference, name)(*wide)
        want = [one.float() for one in want] if isinstance(want, list) else want.float()
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
def test_the_forward_keeps_its_inputs_and_three_numbers_a_row(kernel, device, mul):
    inputs = make((3, 2, 48), torch.bfloat16, mul, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = run(kernel, *inputs)
    pointers = {tensor.data_ptr() for tensor in inputs if tensor is not None}
    assert [(tuple(t.shape), t.dtype) for t in kept if t.data_ptr() not in pointers] == [((3, 2, 3), torch.float32)]
    attributes = torch.utils._pytree.tree_leaves(vars(y.grad_fn))
    assert not any(isinstance(attribute, torch.Tensor) for attribute in attributes)


@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
def test_float64_is_computed_in_float64(kernel, device, mul):
    inputs = make((3, 48), torch.float64, mul, device, torch.float64)
    assert_matches_definition(kernel, inputs, torch.randn(3, 48, device=device, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("mul", [False, True], ids=["plain", "mul"])
def test_two_runs_are_equal(kernel, device, mul):
    shape = (7 if INTERPRETED else 37, 100)
    inputs = make(shape, torch.bfloat16, mul, device, torch.bfloat16)
    dy = torch.randn(shape, device=device, dtype=torch.bfloat16)
    first, second = (values_and_gradients(lambda *a: run(kernel, *a), inputs, dy) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert [output.dtype for output in first] == [torch.bfloat16] * len(first)


def test_a_row_does_not_depend_on_its_batch(kernel, device):
    x, up, weight, bias = make((9, 100), torch.float32, True, device)
    whole = run(kernel, x, up, weight, bias)
    assert torch.equal(whole[4:6], run(kernel, x[4:6], up[4:6], weight, bias))


@pytest.mark.parametrize(
    "operator", [pytest.param(name, marks=slow_if_interpreted) for name in ("poly_norm", "poly_norm_mul")]
)
def test_torch_checks_the_operator(kernel, device, operator):
    x, up, weight, bias = make((3, 48), torch.float32, operator == "poly_norm_mul", device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(kernel.ops._forward, (x, up, weight, bias, 1e-6), test_utils=checks)


@pytest.mark.skipif(INTERPRETED, reason="the compiled graph calls the same operators")
def test_compile_and_export_without_a_break(kernel, device):
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, up):
            return kernel.poly_norm_mul(2 * x, up, self.weight, self.bias) + kernel.poly_norm(
                x, self.weight, self.bias
            )

    gate = Gate().to(device)
    x, up = (torch.randn(5, 48, device=device).requires_grad_() for _ in range(2))
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, up), gate(x, up))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, up).sum(), (x, up)), torch.autograd.grad(gate(x, up).sum(), (x, up))
    )
    exported = torch.export.export(gate, (x, up), dynamic_shapes=({0: torch.export.Dim("rows")},) * 2)
    more = torch.randn(7, 48, device=device)
    torch.testing.assert_close(exported.module()(more, more), gate(more, more))


def test_vmap_gives_what_a_loop_gives(kernel, device):
    x, up, weight, bias = make((3, 4, 16), torch.float32, True, device)
    weights = torch.stack([weight, 2 * weight, -weight])
    together = torch.vmap(kernel.poly_norm_mul, in_dims=(0, 0, 0, None))(x, up, weights, bias)
    apart = torch.stack([kernel.poly_norm_mul(x[i], up[i], weights[i], bias) for i in range(3)])
    torch.testing.assert_close(together, apart)
    columns = torch.vmap(kernel.poly_norm_mul, in_dims=(0, 0, 1, None))(x, up, weights.T.contiguous(), bias)
    torch.testing.assert_close(columns, apart)
    assert torch.vmap(kernel.poly_norm, in_dims=(1, None, None))(x[:, :0], weight, bias).shape == (0, 3, 16)
    with pytest.raises(RuntimeError, match="functorch transforms"):  # torch has no func.grad of custom operators
        torch.func.grad(lambda one: kernel.poly_norm(one, weight, bias).sum())(x.detach())


def test_double_backward_says_no(kernel, device):
    x, _, weight, bias = make((3, 16), torch.float32, False, device)
    (dx,) = torch.autograd.grad(kernel.poly_norm(x, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, when it prepares jvp
@pytest.mark.parametrize("leaf", ["x", "up", "weight", "bias"])
def test_forward_mode_says_no(kernel, device, leaf):
    inputs = dict(zip(("x", "up", "weight", "bias"), make((3, 16), torch.float32, True, device), strict=True))
    value = inputs.pop(leaf).detach()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda one: kernel.poly_norm_mul(**inputs, **{leaf: one}), (value,), (value,))
    with torch.autograd.forward_ad.dual_level():  # nothing here has a tangent
        assert kernel.poly_norm_mul(**inputs, **{leaf: value}).shape == (3, 16)


def test_wrong_inputs_are_named(kernel, device):
    x, up, weight, bias = make((3, 16), torch.float32, True, device)
    for wrong in (weight[:2], weight[None], weight[:, None]):
        with pytest.raises(ValueError, match=r"weight must have the shape \(3,\)"):
            kernel.poly_norm(x, wrong, bias)
    with pytest.raises(ValueError, match="weight must be of a type of"):
        kernel.poly_norm(x, weight.long(), bias)
    with pytest.raises(ValueError, match="one dimension or more"):
        kernel.poly_norm(x[0, 0], weight, bias)
    with pytest.raises(ValueError, match="shape and type"):
        kernel.poly_norm_mul(x, up[:2], weight, bias)
    with pytest.raises(ValueError, match="x must be of a type of"):
        kernel.poly_norm(x.long(), weight, bias)


def test_gradients_of_the_reference(kernel):
    reference = kernel.reference

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, up, weight, bias):
            y, inverse_rms = reference.forward(x, up, weight, bias, 1e-6)
            ctx.save_for_backward(x, up, weight, bias, inverse_rms)
            return y

        @staticmethod
        def backward(ctx, dy):
            dx, dweight, dbias, dup = reference.backward(dy, *ctx.saved_tensors)
            return dx, dup, dweight, dbias

    inputs = [i.detach().double().requires_grad_() for i in make((3, 7), torch.float32, True, "cpu")]
    assert torch.autograd.gradcheck(Reference.apply, inputs)


def test_layers_read_the_parameters_of_their_module(kernel, device):
    x, up, weight, bias = make((3, 16), torch.float32, True, device)
    for name, arguments in (("PolyNorm", (x,)), ("FusedMulPolyNorm", (x, up))):
        layer = getattr(kernel.layers, name)()
        layer.weight, layer.bias, layer.eps = weight, bias, 1e-6
        assert torch.equal(layer(*arguments), run(kernel, x, up if len(arguments) == 2 else None, weight, bias))
