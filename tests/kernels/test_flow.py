"""The flow in one launch: kernels against float64, the reference against the modules and autograd."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import DEVICE, double, flow_parameters
from torch import Tensor

from evalp_fast.kernels import flow, flow_backward, flow_device, philox
from evalp_fast.kernels.flow import FlowOptions, FlowParameters, Noise, coupling_flow, coupling_flow_reference
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, force_int64_offsets

needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
# Such flows have their hidden layers in memory in "ieee", and in registers in "tf32".
each_form = pytest.mark.parametrize("precision", ["ieee", "tf32"])

# dim, hidden, depth, activation, clamp, mixing, normalised: every branch of the kernels, both paths of the
# mixing (halves that fill their tiles, and others), several tiles of hidden features, padding everywhere.
CASES = [
    (2, 8, 1, "relu", 2.0, "swap", False),
    (3, 8, 2, "silu", 2.0, "shuffle", True),
    (5, 17, 1, "silu", None, "shuffle", True),
    (16, 70, 3, "leaky_relu", 1.5, "shuffle", False),
    (32, 20, 2, "relu", 2.0, "shuffle", True),
    (33, 24, 3, "silu", 2.0, "swap", True),
    (48, 130, 2, "leaky_relu", None, "swap", False),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel() -> Iterator[None]:
    with backend("triton"):
        yield


def points(rows: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def unpack(case: tuple[Any, ...], **options: Any) -> tuple[FlowParameters, dict[str, Any]]:
    dim, hidden, depth, activation, clamp, mixing, normalised = case
    options = {"activation": activation, "clamp": clamp, "mixing": mixing, **options}
    return flow_parameters(dim, hidden, depth, normalised=normalised), options


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest magnitude."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def gradients(
    z: Tensor, parameters: FlowParameters, grads: tuple[Tensor, ...], **options: Any
) -> list[Tensor]:
    """x, log_det and the gradients of z and of all parameters that are there."""
    leaves = [t.detach().clone().requires_grad_() for t in (z, *parameters) if t is not None]
    x, log_det = coupling_flow(leaves[0], FlowParameters(*leaves[1:]), **options)
    found = torch.autograd.grad(
        (x, log_det), leaves, tuple(grad.to(x.dtype) for grad in grads), materialize_grads=True
    )
    return [x.detach(), log_det.detach(), *found]


def cotangents(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    return points(rows, dim, seed=2), points(rows, 1, seed=3)[:, 0]


# --- the reference ---


def plain_flow(u: Tensor, parameters: FlowParameters, activation: str, clamp: float, mixing: str) -> Any:
    """The definition, layer by layer, with the mixing as an index."""
    passed, dim = parameters.weight_in.shape[2], u.shape[1]
    first, second = list(range(passed)), list(range(passed, dim))
    if mixing == "swap":
        order = second + first
    else:
        order = [column for pair in zip(second, first, strict=False) for column in pair]
        order += first[len(second) :]
    function: Any = getattr(F, activation)
    z, log_det = u, torch.zeros_like(u[:, 0])
    for l in range(len(parameters.weight_in)):  # noqa: E741
        h = function(F.linear(z[:, :passed], parameters.weight_in[l], parameters.bias_in[l]))
        for weight, bias in zip(parameters.weight_hidden[l], parameters.bias_hidden[l], strict=True):
            h = function(F.linear(h, weight, bias))
        s, t = F.linear(h, parameters.weight_out[l], parameters.bias_out[l]).chunk(2, dim=1)
        s = clamp * torch.tanh(s / clamp)
        z = torch.cat((z[:, :passed], z[:, passed:] * s.exp() + t), dim=1)[:, order]
        log_det = log_det + s.sum(1)
        if parameters.norm_log_scale is not None:
            z = z * parameters.norm_log_scale[l].exp() + parameters.norm_shift[l]
            log_det = log_det + parameters.norm_log_scale[l].sum()
    return z, log_det


@pytest.mark.parametrize("mixing", ["shuffle", "swap"])
@pytest.mark.parametrize(
    ("dim", "depth", "activation"), [(2, 1, "relu"), (7, 2, "silu"), (8, 3, "leaky_relu")]
)
def test_reference_is_the_definition(dim: int, depth: int, activation: Any, mixing: Any) -> None:
    parameters = double(flow_parameters(dim, 6, depth, normalised=dim == 7))
    u = points(5, dim).double()
    options = FlowOptions(False, "ieee", activation, 1.5, mixing)
    x, log_det = coupling_flow_reference(u, parameters, options)
    want, want_log_det = plain_flow(u, parameters, activation, 1.5, mixing)
    torch.testing.assert_close(x, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, want_log_det, rtol=1e-12, atol=1e-12)
    back, back_log_det = coupling_flow_reference(x, parameters, options._replace(inverse=True))
    torch.testing.assert_close(back, u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-10, atol=1e-10)


@both_ways
@each_case
def test_reference_log_det_is_that_of_the_jacobian(case: tuple[Any, ...], inverse: bool) -> None:
    parameters, options = unpack(case)
    options = FlowOptions(inverse=inverse, precision="ieee", **options)
    z = points(1, case[0]).double()

    def map_one(row: Tensor) -> Tensor:
        return coupling_flow_reference(row[None], double(parameters), options)[0][0]

    jacobian = torch.autograd.functional.jacobian(map_one, z[0])
    log_det = coupling_flow_reference(z, double(parameters), options)[1]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[0], rtol=1e-9, atol=1e-9)


@both_ways
@each_case
def test_backward_reference_is_autograd(case: tuple[Any, ...], inverse: bool) -> None:
    parameters, options = unpack(case)
    options = FlowOptions(inverse=inverse, precision="ieee", **options)
    leaves = [t.double().requires_grad_() for t in (points(4, case[0]), *parameters) if t is not None]
    stacks = FlowParameters(*leaves[1:])
    x, log_det = coupling_flow_reference(leaves[0], stacks, options)
    grads = tuple(grad.double() for grad in cotangents(4, case[0]))
    want = torch.autograd.grad((x, log_det), leaves, grads, materialize_grads=True)
    grad_z, found = flow.coupling_flow_backward_reference(*grads, x.detach(), stacks, options)
    for got, true in zip((grad_z, *found), want, strict=False):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-8)


# --- the kernels ---


@needs_kernel
@both_ways
@each_case
def test_kernel_against_float64(case: tuple[Any, ...], inverse: bool, kernel: None) -> None:
    """x, log_det and all gradients of a batch that does not fill a tile; 1e-5 is some forty roundings."""
    parameters, options = unpack(case, inverse=inverse)
    rows, dim = 7, case[0]
    got = gradients(points(rows, dim), parameters, cotangents(rows, dim), **options)
    with backend("reference"):
        want = gradients(points(rows, dim).double(), double(parameters), cotangents(rows, dim), **options)
    for k, (actual, expected) in enumerate(zip(got, want, strict=True)):
        assert distance(actual, expected) < 1e-5, k


@needs_kernel
@both_ways
def test_gradient_of_the_input_alone_takes_one_launch(inverse: bool, kernel: None, monkeypatch: Any) -> None:
    launches = []
    launch = flow_backward.launch
    monkeypatch.setattr(flow_backward, "launch", lambda *a, **k: (launches.append(k), launch(*a, **k)))
    parameters, options = unpack(CASES[4], inverse=inverse)
    grads = cotangents(5, 32)
    want = gradients(points(5, 32), parameters, grads, **options)[2]
    assert [call["COUNT"] for call in launches] == [1, 1, 1]
    z = points(5, 32).requires_grad_()
    (got,) = torch.autograd.grad(coupling_flow(z, parameters, **options), z, grads)
    assert [call["COUNT"] for call in launches] == [1, 1, 1, 3]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("rows", [0, 1, 65])
def test_any_number_of_rows(rows: int, kernel: None) -> None:
    parameters, options = unpack(CASES[1])
    got = gradients(points(rows, 3), parameters, cotangents(rows, 3), **options)
    with backend("reference"):
        want = gradients(points(rows, 3).double(), double(parameters), cotangents(rows, 3), **options)
    for actual, expected in zip(got, want, strict=True):
        assert distance(actual, expected) < 1e-5 or rows == 0
        assert torch.isfinite(actual).all()


@needs_kernel
@pytest.mark.parametrize("rows", [1, 40])
def test_results_are_no_views_of_whole_tiles(rows: int, kernel: None) -> None:
    """Guards against a result that autograd forbids to change in place, and one saved with its padding."""
    parameters = FlowParameters(*(p if p is None else p.requires_grad_() for p in flow_parameters(5, 8, 1)))
    z = points(rows, 5).requires_grad_()
    x, log_det = coupling_flow(z, parameters)
    grad = torch.autograd.grad(x.sum() + log_det.sum(), z)[0]
    x += 1.0
    for tensor in (x, grad):
        assert tensor._base is None
        assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes


@needs_kernel
@each_form
@both_ways
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=["odd", "even"])
def test_a_row_does_not_depend_on_its_batch(
    case: tuple[Any, ...], inverse: bool, precision: str, kernel: None
) -> None:
    parameters, options = unpack(case, inverse=inverse, precision=precision)
    z = points(70, case[0])
    x, log_det = coupling_flow(z, parameters, **options)
    for some in (slice(3, 4), slice(60, 69)):
        part, part_log_det = coupling_flow(z[some], parameters, **options)
        assert torch.equal(part, x[some])
        assert torch.equal(part_log_det, log_det[some])


@needs_kernel
@each_form
@pytest.mark.parametrize("dim", [2, 3, 5, 16, 33])
def test_noise_made_inside_is_that_of_philox(dim: int, precision: Any, kernel: None) -> None:
    """Of a flow that only moves columns: were a column's block or word wrong, all of it would differ."""
    parameters = flow_parameters(dim, 4, 1, layers=1)
    still = parameters._replace(weight_out=0 * parameters.weight_out, bias_out=0 * parameters.bias_out)
    seed, start = -(3**39), 2**33 + 5
    index = torch.arange(start, start + 7, device=DEVICE)
    noise = philox.normal(seed, index, 6, philox.Stream.PROPOSAL, dim)
    want, _ = coupling_flow(noise, still, precision=precision)
    for source in (
        Noise(seed, index, 6),
        Noise(torch.tensor([seed], device=DEVICE), range(start, start + 7), 6),
    ):
        x, log_det = coupling_flow(source, still, precision=precision)
        torch.testing.assert_close(x, want, rtol=0, atol=1e-6)
        assert (log_det == 0).all()
    scaled, _ = coupling_flow(Noise(seed, index, 6), still, precision=precision, temperature=0.25)
    torch.testing.assert_close(scaled, 0.5 * want, rtol=0, atol=1e-6)


@on_each_backend
def test_noise_and_the_tensor_of_it_give_the_same_sample(name: str) -> None:
    parameters, options = unpack(CASES[2])
    with backend(name):
        z = philox.normal(9, range(3, 12), 0, philox.Stream.PROPOSAL, 5, device=DEVICE)
        want = coupling_flow(z, parameters, **options)
        for actual, expected in zip(coupling_flow((9, 3, 9), parameters, **options), want, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        stacks = FlowParameters(*(t.detach().requires_grad_() for t in parameters if t is not None))
        x, log_det = coupling_flow((9, 3, 9), stacks, **options)
        (x.square().sum() + log_det.sum()).backward()
        from_noise = [stack.grad for stack in stacks if stack is not None]
        copies = FlowParameters(*(t.detach().requires_grad_() for t in parameters if t is not None))
        x, log_det = coupling_flow(z, copies, **options)
        (x.square().sum() + log_det.sum()).backward()
        for got, stack in zip(from_noise, copies, strict=True):
            torch.testing.assert_close(got, stack.grad, rtol=1e-4, atol=1e-4)
    assert coupling_flow((9, 3, 0), parameters)[0].shape == (0, 5)


@needs_kernel
@each_form
@both_ways
def test_strides_and_int64_offsets(inverse: bool, precision: Any, kernel: None) -> None:
    parameters, options = unpack(CASES[2], inverse=inverse, precision=precision)
    z = points(7, 5)
    want = gradients(z, parameters, cotangents(7, 5), **options)
    for strided in (z.t().contiguous().t(), points(7, 10)[:, ::2].copy_(z), z[:1].expand(7, 5)):
        got = coupling_flow(strided, parameters, **options)
        expected = want[:2] if strided.stride(0) else [t[:1].expand(t.shape) for t in want[:2]]
        for actual, true in zip(got, expected, strict=True):
            assert torch.equal(actual, true)
    grads = tuple(torch.ones((), device=DEVICE).expand(t.shape) for t in cotangents(7, 5))
    plain = gradients(z, parameters, tuple(grad.contiguous() for grad in grads), **options)
    with force_int64_offsets():
        got = gradients(z, parameters, grads, **options)
        for actual, true in zip(got, plain, strict=True):
            assert torch.equal(actual, true)
        x, _ = coupling_flow((1, 2, 7), parameters, **options)
    assert torch.equal(x, coupling_flow((1, 2, 7), parameters, **options)[0])


@needs_kernel
def test_round_trip(kernel: None) -> None:
    """Eight couplings and back: each magnifies a rounding by at most its largest stretching, exp(2)."""
    parameters = flow_parameters(16, 32, 2, layers=8)
    u = points(64, 16)
    x, log_det = coupling_flow(u, parameters)
    back, back_log_det = coupling_flow(x, parameters, inverse=True)
    assert (back - u).abs().max() < 1e-4
    assert (back_log_det + log_det).abs().max() < 1e-4


@on_each_backend
@pytest.mark.parametrize("wanted", ["input", "everything"])
def test_second_derivatives(name: str, wanted: str) -> None:
    """Of the squared norm of a gradient, against the float64 reference, where autograd does all of it."""
    parameters, options = unpack(CASES[1])

    def second(z: Tensor, parameters: FlowParameters) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (z, *parameters) if t is not None]
        stacks = leaves[1:] if wanted == "everything" else [t.detach() for t in leaves[1:]]
        x, log_det = coupling_flow(leaves[0], FlowParameters(*stacks), **options)
        (grad,) = torch.autograd.grad(x.square().sum() + log_det.sin().sum(), leaves[0], create_graph=True)
        chosen = leaves if wanted == "everything" else leaves[:1]
        return list(torch.autograd.grad(grad.square().sum(), chosen))

    with backend(name):
        got = second(points(3, 3), parameters)
    with backend("reference"):
        want = second(points(3, 3).double(), double(parameters))
    for actual, expected in zip(got, want, strict=True):
        assert distance(actual, expected) < 2e-5


def test_gradcheck_of_the_op() -> None:
    """The autograd.Function over the reference of the backward pass, in float64, to second order."""
    parameters, options = unpack((3, 4, 2, "silu", 2.0, "shuffle", True))
    stacks = [t.cpu().double() for t in parameters if t is not None]
    rest = FlowOptions(precision="ieee", **options)

    def apply(*leaves: Tensor) -> Any:
        source = flow._Source(leaves[0], None, None, 0, 0, 0, 2, 1.0)
        return flow._CouplingFlow.apply(*source, *leaves[1:], *rest)

    leaves = [t.requires_grad_() for t in (points(2, 3).cpu().double(), *stacks)]
    assert torch.autograd.gradcheck(apply, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, leaves, fast_mode=True)


@pytest.mark.parametrize("inverse", [False, True])
def test_memory_kept_for_the_backward_pass_does_not_grow_with_depth(inverse: bool) -> None:
    """Guards against saving a layer's activations: what is kept is the result and the parameters."""
    kept: dict[int, int] = {}
    for layers in (2, 9):
        parameters = FlowParameters(
            *(t.cpu().requires_grad_() for t in flow_parameters(4, 8, 2, layers=layers) if t is not None)
        )
        own = {t.data_ptr() for t in parameters if t is not None}
        extra: list[int] = []

        def pack(t: Tensor, own: set[int] = own, extra: list[int] = extra) -> Tensor:
            if t.data_ptr() not in own:
                extra.append(t.numel())
            return t

        rest = FlowOptions(inverse, "ieee", "relu", 2.0, "shuffle")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            source = flow._Source(points(16, 4).cpu().requires_grad_(), None, None, 0, 0, 0, 16, 1.0)
            flow._CouplingFlow.apply(*source, *parameters, *rest)
        kept[layers] = sum(extra)
    assert kept[2] == kept[9] == 16 * 4


def test_opcheck() -> None:
    for case in (CASES[1], CASES[0]):
        parameters, options = unpack(case)
        stacks = [None if t is None else t.cpu() for t in parameters]
        z = points(4, case[0]).cpu()
        index = torch.arange(4)
        rest = (False, "ieee", *options.values())
        ops: Any = torch.ops.evalp_fast
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        check: Any = torch.library.opcheck
        check(ops.coupling_flow.default, (z, None, None, 0, 0, 0, 4, 1.0, *stacks, *rest), test_utils=tests)
        noise = (None, index, torch.tensor([3]), 0, 1, 0, 4, 0.5)
        check(ops.coupling_flow.default, (*noise, *stacks, *rest), test_utils=tests)
        grads = (torch.randn(4, case[0]), torch.randn(4), z)
        for wanted in (False, True):
            check(ops.coupling_flow_backward.default, (*grads, *stacks, wanted, *rest), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    """Traced, with gradients; the code that Inductor would make of it is not what is tested here."""
    parameters = FlowParameters(
        *(t.cpu().requires_grad_() for t in flow_parameters(5, 7, 2, normalised=True) if t is not None)
    )

    def loss(z: Any) -> Tensor:
        x, log_det = coupling_flow(z, parameters)
        return x.square().sum() - log_det.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6):
        z = points(rows, 5).cpu()
        torch.testing.assert_close(compiled(z), loss(z))
        got = torch.autograd.grad(compiled(z), parameters.weight_in)[0]
        torch.testing.assert_close(got, torch.autograd.grad(loss(z), parameters.weight_in)[0])

    def sample(start: int) -> Tensor:
        return coupling_flow((1, start, 4), parameters)[0].detach()

    drawn = torch.compile(sample, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(drawn(3), sample(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
def test_bf16_products_are_accurate_enough(inverse: bool) -> None:
    """Positions within 2e-2 of float64, log-determinants within 0.25; matrices may come rounded."""
    parameters = flow_parameters(16, 64, 2, layers=8)
    z = points(256, 16)
    options: Any = {"precision": "bf16", "inverse": inverse}
    with backend("reference"):
        x, log_det = coupling_flow(z, parameters, **options)
        want, want_log_det = coupling_flow(z.double(), double(parameters), inverse=inverse)
        error = float((x - want).norm() / want.norm())
        assert 1e-4 < error < 2e-2  # not below: then nothing was rounded
        assert float((log_det - want_log_det).abs().max()) < 0.25
        rounded = FlowParameters(
            *(t.bfloat16() if k % 2 == 0 else t for k, t in enumerate(parameters[:6]) if t is not None)
        )
        assert torch.equal(coupling_flow(z, rounded, **options)[0], x)


@needs_kernel
def test_shapes_that_do_not_fit_take_the_reference() -> None:
    assert flow_device.flow_fits(1024, 512, 3) is None
    for dim, hidden, depth, word in ((1025, 8, 1, "1025"), (4, 513, 1, "513"), (4, 8, 4, "4 hidden layers")):
        reason = flow_device.flow_fits(dim, hidden, depth)
        assert reason is not None
        assert word in reason
    parameters = flow_parameters(4, 8, 4, layers=1)
    assert coupling_flow(points(2, 4), parameters)[0].shape == (2, 4)
    with backend("triton"), pytest.raises(RuntimeError, match="4 hidden layers"):
        coupling_flow(points(2, 4), parameters)
    with backend("triton"), pytest.raises(RuntimeError, match="float64"):
        coupling_flow(points(2, 4).double(), double(flow_parameters(4, 8, 1)))


P = flow_parameters(5, 8, 2)
Z = points(3, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z[:, :4], P), {}, ValueError, r"z must have shape \[N, 5\]"),
        ((Z.double(), P), {}, TypeError, "z must be torch.float32"),
        (([1.0], P), {}, TypeError, "z must be a tensor, a Noise"),
        (((0, -1, 4), P), {}, ValueError, "start and n"),
        ((Noise(2**63, range(4)), P), {}, ValueError, "z.seed"),
        ((Noise(torch.zeros(2), range(4)), P), {}, TypeError, "z.seed"),
        ((Noise(0, range(0, 4, 2)), P), {}, ValueError, "z.index"),
        ((Noise(0, torch.zeros(4)), P), {}, TypeError, "z.index"),
        ((Noise(0, range(4), -1), P), {}, ValueError, "z.step"),
        ((Z, P[:6]), {}, TypeError, "parameters must be a FlowParameters"),
        ((Z, P._replace(bias_in=P.bias_in[:, :3])), {}, ValueError, "parameters.bias_in"),
        ((Z, P._replace(weight_out=P.weight_out[:, :2])), {}, ValueError, "D1 = D2"),
        ((Z, P._replace(weight_hidden=P.bias_in)), {}, ValueError, "weight_hidden"),
        ((Z, P._replace(weight_in=P.weight_in.double())), {}, TypeError, "parameters.weight_in"),
        ((Z, P._replace(weight_in=P.weight_in.bfloat16())), {}, TypeError, "parameters.weight_in"),
        ((Z, P._replace(weight_in=None)), {}, TypeError, "parameters.weight_in"),
        ((Z, P._replace(norm_shift=Z)), {}, ValueError, "norm_log_scale"),
        ((Z, P), {"precision": "fp16"}, ValueError, "precision"),
        ((Z, P), {"activation": "gelu"}, ValueError, "activation"),
        ((Z, P), {"mixing": "none"}, ValueError, "mixing"),
        ((Z, P), {"clamp": 0.0}, ValueError, "clamp"),
        ((Z, P), {"temperature": 0.5}, ValueError, "temperature"),
        (((0, 0, 4), P), {"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        coupling_flow(*arguments, **options)


@on_each_backend
def test_batch_norm_is_a_normalisation(name: str) -> None:
    """In evaluation, by the formulas that `FlowParameters` states."""
    dim = 7
    norm = torch.nn.BatchNorm1d(dim).to(DEVICE)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(0.5 + torch.rand(dim, generator=generator))  # type: ignore[union-attr]
        deviation = (norm.running_var + norm.eps).sqrt()
        log_scale = (norm.weight / deviation).log()
        shift = norm.bias - norm.running_mean * norm.weight / deviation
        plain, z = flow_parameters(dim, 8, 2, layers=1), points(5, dim)
        with backend(name):
            x, log_det = coupling_flow(z, plain)
            folded = plain._replace(norm_log_scale=log_scale[None], norm_shift=shift[None])
            found, found_log_det = coupling_flow(z, folded)
        torch.testing.assert_close(found, norm.eval()(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found_log_det, log_det + log_scale.sum(), rtol=1e-5, atol=1e-5)


# --- on a GPU ---


@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 1e-5), ("tf32", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize(
    ("dim", "hidden", "depth"),
    [(16, 192, 2), (64, 256, 2), (128, 256, 2), (33, 200, 3), (128, 256, 3), (256, 512, 1), (1024, 512, 2)],
)
def test_precisions_against_float64(
    dim: int, hidden: int, depth: int, precision: Any, tolerance: float, inverse: bool
) -> None:
    """Errors in the root mean square, relative to that of the values."""
    parameters = flow_parameters(dim, hidden, depth, layers=8)
    rows = 1000
    options: Any = {"inverse": inverse}
    with backend(None):
        got = gradients(points(rows, dim), parameters, cotangents(rows, dim), precision=precision, **options)
    with backend("reference"):
        want = gradients(points(rows, dim).double(), double(parameters), cotangents(rows, dim), **options)
    for k, (actual, expected) in enumerate(zip(got, want, strict=True)):
        error = float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))
        assert error < tolerance * (1 if k < 2 else 5), k


@pytest.mark.gpu
def test_repeated_backward_passes_are_equal() -> None:
    parameters = flow_parameters(64, 256, 2, layers=4)
    with backend("triton"):
        runs = [gradients(points(3000, 64), parameters, cotangents(3000, 64)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
