"""The table of the kernel audit: which kernels are compiled, in which configurations, and what they must be.

To add a kernel, append a `Case` to `CASES`: a name, the kernel's function name, a call on meta tensors of a
representative shape (`meta(rows, columns)`; the launcher must not read values: call the op where the public
function does), and what one program does. Write "bytes" and the declared number in the kernel's docstring, or
two numbers (read, written) of which it is the sum.

Static counts cannot know how often a loop runs: `elements` is what one pass over the code handles, which for
a kernel that loops is one trip. Where the compiler has unrolled the loop, the streamed bytes come out as a
whole multiple of the declared ones; that factor is found and divided out. A case whose alternatives are
compiled in but exclude each other at run time cannot be counted so: give it `bytes_per_element=None`, which
leaves that check out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evalp_fast.kernels import philox
from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import FlowParameters, coupling_flow
from evalp_fast.kernels.importance import summarize
from evalp_fast.kernels.langevin import langevin_step
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.launch import HAS_TRITON, Launch, triton_version
from evalp_fast.kernels.metropolis import mala_accept
from evalp_fast.kernels.resampling import SCHEMES
from evalp_fast.kernels.sir import weighting
from evalp_fast.kernels.weights_gpu import bfloat16_copies

ops: Any = torch.ops.evalp_fast


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, and what it must compile to.

    Attributes:
        name: unique in the table.
        kernel: name of the `@triton.jit` function among the launches that `call` makes; the first one counts.
        call: makes them, on meta tensors.
        elements: how many one pass over the kernel's code handles in one program; a function of the launch.
        bytes_per_element: bytes that must stream through memory per element, or None where it is not counted.
        memory_bound: whether the streams must be 16-byte accesses.
        matrix: whether a matrix product must be there.
        wgmma: whether on sm_90 all of them must be wgmma: what multiplies at the full rate of Hopper.
        double: why float64 is allowed; empty where it is not.
        spills: spill instructions that are allowed; `spill_reason` says why.
        no_spills_on: the targets where none is allowed all the same.
        narrow: why the streams of a memory-bound kernel are not 16-byte accesses; empty where they must be.
        narrow_on: the targets that `narrow` is about, where not all.
        repeated: bytes per element that 16-byte accesses may read beside the streams, because they are in the
            cache: a mask that rows share, numbers of a row that each of its threads reads.
    """

    name: str
    kernel: str
    call: Callable[[], Any]
    elements: Callable[[Launch], int]
    bytes_per_element: float | None
    memory_bound: bool = True
    matrix: bool = False
    wgmma: bool = False
    double: str = ""
    spills: int = 0
    spill_reason: str = ""
    no_spills_on: tuple[str, ...] = ()
    narrow: str = ""
    narrow_on: tuple[str, ...] = ()
    repeated: float = 0.0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory: shapes, strides and dtypes are all that a launcher reads."""
    return torch.empty(shape, dtype=dtype, device="meta")


def block(*names: str) -> Callable[[Launch], int]:
    """The product of these constants of the launch: what one pass over a tile handles."""
    return lambda launch: math.prod(launch.constants[name] for name in names)


def _fill(kind: Callable[..., Tensor], width: int, **options: Any) -> Callable[[], Tensor]:
    return lambda: kind(1, range(65536), 0, philox.Stream.PROPOSAL, width, device="meta", **options)


def _coupling(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    return lambda: affine_coupling(*(meta(*shape, dtype=dtype) for _ in range(3)), **options)


def _coupling_backward(rows: int, columns: int) -> Callable[[], Any]:
    x = (rows, columns)
    return lambda: ops.affine_coupling_backward(meta(*x), meta(rows), meta(*x), meta(*x), None, 2.0, False)


def _langevin(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    def call() -> None:
        x, grad = ([meta(*shape, dtype=dtype) for shape in shapes] for _ in range(2))
        index = meta(shapes[0][0], dtype=torch.int64)
        langevin_step(x, grad, 1e-4, seed=0, index=index, step=3, out=x, **options)

    return call


def _mala(rows: int, columns: int) -> Callable[[], Any]:
    def call() -> None:
        x, grad, proposal, proposal_grad = (meta(rows, columns) for _ in range(4))
        index, energy = meta(rows, dtype=torch.int64), (meta(rows), meta(rows))
        options = {"seed": 0, "index": index, "step": 3}
        mala_accept(x, energy[0], grad, proposal, energy[1], proposal_grad, 1e-4, **options)

    return call


def _weights(op: str, rows: int, n: int, *scalars: int) -> Callable[[], Any]:
    """An op that draws: public functions read the rows' maxima, which a meta tensor does not have."""
    index, seed = meta(rows, dtype=torch.int64), meta(1, dtype=torch.int64)
    return lambda: getattr(ops, op)(meta(rows, n), index, seed, *scalars)


def _summary_backward(rows: int, n: int) -> Callable[[], Any]:
    return lambda: ops.weight_summary_backward(meta(rows, n), *(meta(rows) for _ in range(5)))


def _coupling_halves(
    *shape: int, dtype: torch.dtype = torch.float32, mask: tuple[int, ...] | None = None, **options: Any
) -> Callable[[], Any]:
    """A flow's step and its backward: halves of wider tensors in dimension 1, or whole ones and a mask."""

    def call() -> None:
        half = [tensor.requires_grad_() for tensor in (meta(*shape, dtype=dtype), meta(*shape, dtype=dtype))]
        if mask is None:
            x, log_scale, shift = half[0].chunk(2, 1)[1], *half[1].chunk(2, 1)
            y, log_det = affine_coupling(x, log_scale, shift, clamp=2.0, **options)
        else:
            chosen = meta(*mask, dtype=torch.bool)
            y, log_det = affine_coupling(half[0], half[1], half[0], clamp=2.0, mask=chosen, **options)
        torch.autograd.grad((y, log_det), half, (torch.empty_like(y), torch.empty_like(log_det)))

    return call


def _flow(dim: int, hidden: int, precision: Any, depth: int = 2, **options: Any) -> Callable[[], Any]:
    """Samples of a flow of eight couplings; or, with `inverse`, the noise of given samples."""
    z = meta(65536, dim) if options.get("inverse") else (0, 0, 65536)
    return lambda: coupling_flow(z, _flow_parameters(dim, hidden, depth), precision=precision, **options)


def _flow_parameters(dim: int, hidden: int, depth: int) -> FlowParameters:
    passed, changed = (dim + 1) // 2, dim // 2
    shapes = ((8, hidden, passed), (8, hidden), (8, depth - 1, hidden, hidden), (8, depth - 1, hidden))
    return FlowParameters(*(meta(*shape) for shape in (*shapes, (8, 2 * changed, hidden), (8, 2 * changed))))


def _flow_gradients(
    dim: int, hidden: int, precision: Any, depth: int = 2, *, parameters: bool
) -> Callable[[], Any]:
    def call() -> None:
        z, weights = meta(65536, dim).requires_grad_(), _flow_parameters(dim, hidden, depth)
        if parameters:
            weights.bias_out.requires_grad_()
        x, log_det = coupling_flow(z, weights, precision=precision)
        wanted = (z, weights.bias_out) if parameters else (z,)
        torch.autograd.grad((x, log_det), wanted, (torch.empty_like(x), torch.empty_like(log_det)))

    return call


def _copies(*shape: int) -> Callable[[], Any]:
    return torch.no_grad()(lambda: bfloat16_copies((meta(*shape),), {}))


def _energy(
    function: Callable[..., Any], dim: int, hidden: int, depth: int, **options: Any
) -> Callable[[], Any]:
    """An MLP energy: its value, its value and gradient, or a chain of 60 steps on it."""
    widths = [dim, *[hidden] * depth, 1]
    weights = tuple(meta(widths[k + 1], widths[k]) for k in range(depth + 1))
    parameters = EnergyParameters(weights, tuple(meta(width) for width in widths[1:]))
    if function is langevin_chain:
        options |= {"n_steps": 60, "step_size": 0.1}
    return lambda: function(meta(65536, dim), parameters, **options)


def _energy_case(
    function: Callable[..., Any],
    dim: int,
    hidden: int,
    depth: int,
    activation: str,
    precision: str,
    spills: int,
    **options: Any,
) -> tuple[str, Callable[[], Any], int]:
    call = _energy(function, dim, hidden, depth, activation=activation, precision=precision, **options)
    return f"{dim} {hidden}x{depth} {activation} {precision}", call, spills


# Columns, hidden layers, activation, precision; and the spills that are allowed.
_ENERGIES = {
    "16 bf16": (16, 256, 3, "silu", "bf16", 32),
    "128 bf16": (128, 200, 2, "leaky_relu", "bf16", 16),
    "128 tf32": (128, 200, 2, "leaky_relu", "tf32", 16),
    "128 ieee": (128, 200, 2, "leaky_relu", "ieee", 0),
    "512 bf16": (512, 512, 3, "silu", "bf16", 16),
}
_TILE = block("BLOCK_ROWS", "BLOCK_COLUMNS")
_ROWS = block("ROWS", "BLOCK")
_CHUNKS = block("ROWS", "COLUMNS")
_GROUPS = block("BLOCK", "VECTOR")
_FLOW = (65536, 64)
_IMAGE = (256, 48, 16, 16)
_VAEBM = ((256, 20, 8, 8), (256, 3, 64, 64))
_FIXED_POINT = "weights are summed in 64 bits, and a slot's position is a float64: exact at 2^24 particles"
_ANY_ROW = (
    "the compiler is not told that rows of 100 begin at multiples of 16 bytes: coalesced 4-byte accesses"
)
# Where a flow must not spill: by Triton 3.6 on Hopper alone.
_NO_SPILLS = ("sm_90", "sm_100", "gfx942") if HAS_TRITON and triton_version() >= (3, 9) else ("sm_90",)
_BEFORE_THE_LOOPS = (
    "none on sm_90, and none by Triton 3.9; by 3.6, on sm_80 and for odd D on gfx942, numbers that do not"
    " change are put aside before a layer's loop over hidden features, which does most of the work"
)
_HELD = "addresses, put aside once a layer: outside the loops of products, and none on sm_90"
_ADDRESSES = "a few addresses, put aside once and read once a layer; outside the loops over features"
_MULTINOMIAL, _SYSTEMATIC, _RESIDUAL = (
    SCHEMES.index(name) for name in ("multinomial", "systematic", "residual")
)


def _sir(
    dim: int,
    couplings: int,
    hidden: int,
    energy_hidden: int,
    depth: int,
    activation: str,
    base: str,
    precision: str,
) -> Callable[[], Any]:
    """A million samples from 100 proposals each, of a flow of depth 2 (the public function reads values)."""
    passed, changed = (dim + 1) // 2, dim // 2
    first, last = (couplings, hidden), (couplings, 2 * changed)
    flow = (
        (*first, passed),
        first,
        (couplings, 1, hidden, hidden),
        (couplings, 1, hidden),
        (*last, hidden),
        last,
    )
    widths = [dim, *[energy_hidden] * depth, 1]

    def call() -> None:
        weights = [meta(widths[i + 1], widths[i]) for i in range(depth + 1)]
        biases = [meta(width) for width in widths[1:]]
        rule = weighting(base, "exact", 1.0, 1.0, dim)
        settings = (1.0, precision, "relu", activation, 2.0, "shuffle")
        networks = (*(meta(*shape) for shape in flow), None, None, weights, biases)
        ops.sir(None, None, 3, 0, 1 << 20, 100, *networks, *rule, *settings)

    return call


_ONCE_PER_PROPOSAL = (
    "none on sm_90 in bfloat16; elsewhere addresses that do not change are put aside at the start, and read"
    " once a proposal"
)


def _launches(
    family: str,
    kernel: str,
    reason: str,
    *cases: tuple[str, Callable[[], Any], int],
    no_spills_on: tuple[str, ...] = (),
) -> list[Case]:
    """Cases of a kernel of one launch: the rest of the name, the call, and the spills that are allowed.

    Unless `no_spills_on` is given, none are on sm_90 in bfloat16.
    """
    return [
        Case(
            f"{family} {name}",
            kernel,
            call,
            block("ROWS"),
            None,
            memory_bound=False,
            matrix="ieee" not in name,
            wgmma="bf16" in name,
            spills=spills,
            spill_reason=reason if spills else "",
            no_spills_on=no_spills_on or (("sm_90",) if "bf16" in name else ()),
        )
        for name, call, spills in cases
    ]


CASES: list[Case] = [
    Case("normal 64", "fill_kernel", _fill(philox.normal, 64), _TILE, 4.0),
    Case("normal 4096", "fill_kernel", _fill(philox.normal, 4096), _TILE, 4.0),
    Case("normal bf16 64", "fill_kernel", _fill(philox.normal, 64, dtype=torch.bfloat16), _TILE, 2.0),
    Case("uniform 64", "fill_kernel", _fill(philox.uniform, 64), _TILE, 4.0),
    Case("exponential 100", "fill_kernel", _fill(philox.exponential, 100), _TILE, 4.0),
    Case("words 64", "fill_kernel", _fill(philox.words, 64), _TILE, 8.0),
    Case("coupling f32", "_coupling_kernel", _coupling(_FLOW, torch.float32, clamp=2.0), _ROWS, 16.0),
    Case("coupling bf16", "_coupling_kernel", _coupling(_FLOW, torch.bfloat16, clamp=2.0), _ROWS, 8.0),
    Case("coupling inverse", "_coupling_kernel", _coupling(_IMAGE, torch.float32, inverse=True), _ROWS, 16.0),
    Case("coupling backward", "_coupling_backward_kernel", _coupling_backward(*_FLOW), _ROWS, 20.0),
    Case("coupling halves", "_coupling_kernel", _coupling_halves(65536, 128), _ROWS, 16.0),
    Case(
        "coupling channel halves bf16",
        "_coupling_kernel",
        _coupling_halves(512, 80, 4, 4, dtype=torch.bfloat16),
        _ROWS,
        8.0,
    ),
    Case(
        "coupling checkerboard",
        "_coupling_kernel",
        _coupling_halves(512, 20, 8, 8, mask=(1, 8, 8)),
        _ROWS,
        16.0,
    ),
    Case(
        "coupling checkerboard bf16",
        "_coupling_kernel",
        _coupling_halves(512, 20, 16, 16, dtype=torch.bfloat16, mask=(1, 16, 16)),
        _ROWS,
        8.0,
    ),
    Case(
        "coupling halves backward bf16",
        "_coupling_backward_kernel",
        _coupling_halves(65536, 128, dtype=torch.bfloat16),
        _ROWS,
        10.0,
    ),
    Case(
        "coupling inverse backward",
        "_coupling_backward_kernel",
        _coupling_halves(512, 80, 4, 4, inverse=True),
        _ROWS,
        24.0,
    ),
    Case(
        "coupling checkerboard backward",
        "_coupling_backward_kernel",
        _coupling_halves(512, 20, 8, 8, mask=(1, 8, 8)),
        _ROWS,
        24.0,
    ),
    Case(
        "coupling checkerboard backward bf16",
        "_coupling_backward_kernel",
        _coupling_halves(512, 20, 8, 8, dtype=torch.bfloat16, mask=(1, 8, 8)),
        _ROWS,
        12.0,
    ),
    Case("bfloat16 copies", "_rounding_kernel", _copies(8, 256, 64), block("BLOCK"), 8.0),
    Case("summarize 100", "_summary_kernel", lambda: summarize(meta(1 << 20, 100)), _ROWS, 4.0),
    Case("summarize 2^26", "_summary_kernel", lambda: summarize(meta(1, 1 << 26)), _ROWS, 4.0),
    Case(
        "summarize merge", "_merge_kernel", lambda: summarize(meta(1, 1 << 26)), block("BLOCK"), None, False
    ),
    Case(
        "summarize backward",
        "_summary_backward_kernel",
        _summary_backward(1 << 20, 100),
        _ROWS,
        8.0,
        repeated=12.0,
        narrow=_ANY_ROW,
        narrow_on=("gfx942",),
    ),
    Case("categorical 100", "_race_kernel", _weights("categorical", 1 << 20, 100), _ROWS, 4.0),
    Case(
        "resample 100 -> 1",
        "_draw_rows_kernel",
        _weights("resample", 1 << 20, 100, 1, _MULTINOMIAL),
        _ROWS,
        4.0,
        double=_FIXED_POINT,
    ),
    Case(
        "resample 100 -> 100",
        "_resample_rows_kernel",
        _weights("resample", 1 << 18, 100, 100, _SYSTEMATIC),
        _ROWS,
        None,
        double=_FIXED_POINT,
        narrow=_ANY_ROW,
        narrow_on=("gfx942",),
        spills=2,
        spill_reason="one register, on sm_80 alone",
    ),
    Case(
        "resample 2^26: sums",
        "_block_sums_kernel",
        _weights("resample", 1, 1 << 26, 1 << 26, _SYSTEMATIC),
        block("BLOCK"),
        4.0,
        double=_FIXED_POINT,
    ),
    Case(
        "resample 2^26: deal",
        "_deal_kernel",
        _weights("resample", 1, 1 << 26, 1 << 26, _SYSTEMATIC),
        block("BLOCK"),
        None,
        memory_bound=False,
        double=_FIXED_POINT,
    ),
    Case(
        "resample 2^26: fill",
        "_fill_kernel",
        _weights("resample", 1, 1 << 26, 1 << 26, _SYSTEMATIC),
        block("BLOCK"),
        12.0,
        double=_FIXED_POINT,
        narrow="the slots of a block begin anywhere: its reads are 16 bytes, its writes are 8",
    ),
    Case(
        "resample 2^26: search",
        "_search_kernel",
        _weights("resample", 1, 1 << 26, 1 << 26, _MULTINOMIAL),
        block("OUT"),
        None,
        memory_bound=False,
        double=_FIXED_POINT,
    ),
    Case("langevin f32", "_langevin_kernel", _langevin(((65536, 64),), torch.float32), _GROUPS, 12.0),
    Case(
        "langevin list",
        "_langevin_kernel",
        _langevin(_VAEBM, torch.float32, clamp=(-4.0, 4.0)),
        _GROUPS,
        12.0,
    ),
    Case("langevin bf16", "_langevin_kernel", _langevin(((65536, 64),), torch.bfloat16), _GROUPS, 6.0),
    Case(
        "langevin norm", "_square_norm_kernel", _langevin(_VAEBM, torch.float32, grad_clip=1.0), _CHUNKS, 4.0
    ),
    Case("mala accept", "_accept_kernel", _mala(65536, 64), _CHUNKS, None),
    *_launches(
        "flow",
        "_flow_kernel",
        _BEFORE_THE_LOOPS,
        ("16 bf16", _flow(16, 192, "bf16"), 16),
        ("64 bf16", _flow(64, 256, "bf16"), 0),
        ("128 bf16", _flow(128, 256, "bf16"), 64),
        ("128 bf16 inverse", _flow(128, 256, "bf16", inverse=True), 64),
        ("33 bf16 swap", _flow(33, 200, "bf16", mixing="swap"), 96),
        ("16 tf32", _flow(16, 192, "tf32"), 0),
        ("64 tf32", _flow(64, 256, "tf32"), 0),
        ("128 tf32", _flow(128, 256, "tf32"), 0),
        no_spills_on=_NO_SPILLS,
    ),
    *_launches(
        "flow",
        "_flow_kernel",
        _HELD,
        ("128 bf16 of depth 3", _flow(128, 256, "bf16", 3), 0),
        ("128 tf32 of depth 3", _flow(128, 256, "tf32", 3), 16),
        ("1024 bf16 inverse", _flow(1024, 512, "bf16", inverse=True), 16),
        ("16 ieee", _flow(16, 192, "ieee"), 0),
        ("16 ieee inverse", _flow(16, 192, "ieee", inverse=True), 0),
        ("128 ieee", _flow(128, 256, "ieee"), 0),
        ("1024 ieee", _flow(1024, 512, "ieee"), 0),
    ),
    *_launches(
        "flow backward",
        "_flow_backward_kernel",
        _HELD,
        ("64 bf16", _flow_gradients(64, 256, "bf16", parameters=True), 32),
        ("128 bf16 of z", _flow_gradients(128, 256, "bf16", parameters=False), 32),
        ("128 bf16 of depth 3", _flow_gradients(128, 256, "bf16", 3, parameters=True), 32),
        ("128 tf32 of z", _flow_gradients(128, 256, "tf32", parameters=False), 32),
        ("1024 ieee", _flow_gradients(1024, 512, "ieee", parameters=True), 48),
    ),
    *_launches(
        "sir",
        "_sir_kernel",
        _ONCE_PER_PROPOSAL,
        ("16 bf16", _sir(16, 12, 192, 256, 3, "silu", "flow", "bf16"), 8),
        ("16 tf32", _sir(16, 12, 192, 256, 3, "silu", "flow", "tf32"), 32),
        ("128 bf16", _sir(128, 8, 256, 200, 2, "leaky_relu", "gaussian", "bf16"), 128),
        ("128 tf32", _sir(128, 8, 256, 200, 2, "leaky_relu", "gaussian", "tf32"), 64),
    ),
    *(
        case
        for name, kernel, function, options, networks in (
            ("value", "_energy_kernel", mlp_energy, {}, ("128 bf16",)),
            ("gradient", "_energy_gradient_kernel", mlp_energy_and_gradient, {}, tuple(_ENERGIES)),
            ("chain", "_chain_kernel", langevin_chain, {}, ("128 bf16",)),
            (
                "adjusted chain",
                "_chain_kernel",
                langevin_chain,
                {"adjusted": True},
                ("16 bf16", "128 bf16", "128 ieee"),
            ),
        )
        for case in _launches(
            f"energy {name}",
            kernel,
            _ADDRESSES,
            *(_energy_case(function, *_ENERGIES[key], **options) for key in networks),
        )
    ),
]
