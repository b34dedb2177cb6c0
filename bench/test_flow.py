"""A flow of eight affine couplings: samples, noise included, and densities of given samples.

Everybody has the same weights (`bench/flow_peers.py`), in float32; `bf16` means that the matrix products
alone are rounded, as `precision="bf16"` does. Ours are called as a user does, through the module, which
looks at each call whether the rounded weights that it keeps are still true. Samples are
compared with float64 from the same noise: ours is a function of their numbers, the textbook's comes with its
samples, and the libraries' is drawn again from torch's generator, to which each of their calls gives a seed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checks, textbook
from bench.flow_peers import FLOW_PEERS
from bench.harness import (
    Call,
    Precision,
    Problem,
    Provider,
    Work,
    Workload,
    absent,
    compiled,
    input_sets,
    needs_cuda,
)
from bench.machine import DEVICE, ON_CUDA
from bench.modes import PRODUCTS, QUICKEST, in_modes, suffix
from bench.sizes import SWEEP, Scale, pick
from bench.textbook import CLAMP, FlowWeights
from evalp_fast.kernels import launch
from evalp_fast.kernels.philox import Stream, normal

COUPLINGS, HIDDEN, DEPTH = 8, 256, 2
# Root mean square of the errors of samples, relative, and of log-densities, in nats. Measured with the
# textbook on a CPU, dim 128: 1.8e-7 and 3.0e-3; 8e-6 and 0.050 nats. TF32 has three bits more than bfloat16.
LIMITS: dict[str, float] = {"ieee": 5e-6, "tf32": 1.5e-3, "bf16": 8e-3}
NATS: dict[str, float] = {"ieee": 1e-4, "tf32": 0.03, "bf16": 0.15}
CHECKED = 1 << 14
CHUNK = 2048  # rows whose layers stay in a CPU's caches

not_there = absent("evalp_fast.kernels.flow", "coupling_flow")


def module(weights: FlowWeights) -> Any:
    """`CouplingFlow` with these weights."""
    from evalp_fast.models.flow import CouplingFlow, FlowConfig

    flow = CouplingFlow(FlowConfig(weights.dim, COUPLINGS, HIDDEN, DEPTH, "relu", CLAMP)).to(DEVICE).eval()
    with torch.no_grad():
        for name, value in vars(weights).items():
            getattr(flow, name).copy_(value)
    return flow


def our_sample(precision: Precision, backend: str | None = None) -> Callable[[FlowWeights], Call]:
    """The whole flow from the numbers of its samples."""

    def make(weights: FlowWeights) -> Call:
        from evalp_fast.kernels.flow import Noise

        flow = module(weights)

        def call(index: range) -> Tensor:
            with launch.backend(backend):
                return flow(Noise(0, index), precision=precision)[0]

        return call

    return make


def our_density(precision: Precision, backend: str | None = None) -> Callable[[FlowWeights], Call]:
    """The inverse, and the base's density."""

    def make(weights: FlowWeights) -> Call:
        flow = module(weights)

        def call(x: Tensor) -> Tensor:
            with launch.backend(backend):
                return flow.log_prob(x, precision=precision)

        return call

    return make


def noise_of(index: Tensor, dim: int) -> Tensor:
    """The noise of those samples."""
    return normal(0, index, 0, Stream.PROPOSAL, dim)


def composed_sample(weights: FlowWeights) -> Call:
    """In float32, the noise first, then the flow."""
    flow = module(weights)
    return lambda index: flow(normal(0, index, 0, Stream.PROPOSAL, weights.dim, device=DEVICE))[0]


def by_parts(function: Callable[[Tensor], Tensor], rows: int | None) -> Callable[[Tensor], Tensor]:
    """`function` of that many rows at a time."""
    return function if rows is None else lambda x: torch.cat([function(part) for part in x.split(rows)])


def torch_sample(
    product: textbook.Linear, mode: str | None = None, rows: int | None = None
) -> Callable[[FlowWeights], Call]:
    """The textbook's flow, with its noise, which is made outside of what is compiled: faster on a CPU."""

    def make(weights: FlowWeights) -> Call:
        order = textbook.shuffle(weights.dim)

        def forward(u: Tensor) -> Tensor:
            return textbook.flow_forward(weights, order, u, product)[0]

        function = by_parts(forward if mode is None else compiled(forward, mode), rows)

        def call(index: range) -> tuple[Tensor, Tensor]:
            u = torch.randn(len(index), weights.dim, device=DEVICE)
            return function(u), u

        return call

    return make


def torch_density(
    product: textbook.Linear, mode: str | None = None, rows: int | None = None
) -> Callable[[FlowWeights], Call]:
    """The textbook's density."""

    def make(weights: FlowWeights) -> Call:
        order = textbook.shuffle(weights.dim)

        def density(x: Tensor) -> Tensor:
            return textbook.flow_log_prob(weights, order, x, product)

        return by_parts(density if mode is None else compiled(density, mode), rows)

    return make


def compiled_in_chunks(make: Callable[..., Callable[[FlowWeights], Call]], n: int) -> list[Provider]:
    """What torch.compile makes of a batch that leaves a CPU's caches where it is given little at a time."""
    if ON_CUDA or n < 8 * CHUNK:
        return []
    name = f"torch.compile in chunks{suffix(QUICKEST)}"
    return [Provider(name, make(PRODUCTS[QUICKEST], "default", CHUNK), QUICKEST, compiles=True)]


def _ours(make: Callable[..., Callable[[FlowWeights], Call]]) -> list[Provider]:
    def only_cuda() -> str | None:
        return not_there() or needs_cuda()

    return [
        Provider("evalp_fast bf16", make("bf16"), "bf16", not_there, compiles=True),
        Provider("evalp_fast tf32", make("tf32"), "tf32", only_cuda, compiles=True),
        Provider("evalp_fast", make("ieee"), "ieee", not_there, compiles=True),
        *(
            [Provider("evalp_fast reference", make("ieee", "reference"), "ieee", not_there)]
            if ON_CUDA
            else []
        ),
    ]


def sample_problem(dim: int, n: int, scale: Scale) -> Problem:
    """n samples from noise that is made on the way."""
    weights = textbook.flow_weights(dim, COUPLINGS, HIDDEN, DEPTH)

    def peer(name: str) -> Callable[[FlowWeights], Call]:
        def make(weights: FlowWeights) -> Call:
            sample = FLOW_PEERS[name][1](weights).sample

            def call(index: range) -> Any:
                torch.manual_seed(index.start)
                return sample(len(index))

            return call

        return make

    def noise_behind(provider: Provider, result: Any, index: range, rows: Tensor) -> Tensor:
        if provider.name.startswith("evalp_fast"):
            return noise_of(index.start + rows, dim)
        if provider.name not in FLOW_PEERS:
            return result[1][rows]
        base = FLOW_PEERS[provider.name][1](weights).base
        torch.manual_seed(index.start)
        return base(n)[rows]

    def setup() -> Workload:
        exact, order = weights.double(), textbook.shuffle(dim)
        rows = checks.some(n, CHECKED)

        def check(provider: Provider, result: Any, index: range) -> None:
            x = result[0] if isinstance(result, tuple) else result
            assert x.shape == (n, dim), f"shape {tuple(x.shape)}, not {(n, dim)}"
            assert x.dtype == torch.float32, f"dtype {x.dtype}, not float32"
            checks.finite(x, "a sample")
            noise = noise_behind(provider, result, index, rows).double()
            checks.standard_normal_rows(noise)
            wanted = textbook.flow_forward(exact, order, noise)[0]
            checks.relative_error(x[rows], wanted, LIMITS[provider.precision], "a sample")

        inputs = [(range(k * n, (k + 1) * n),) for k in range(2)]
        return Workload(weights, inputs, check)

    return Problem(
        "flow",
        f"sample, dim {dim}, batch {n:,}",
        {"batch": n, "dim": dim, "couplings": COUPLINGS, "hidden": HIDDEN, "depth": DEPTH},
        n,
        setup,
        (
            *_ours(our_sample),
            Provider("evalp_fast composed", composed_sample),
            *compiled_in_chunks(torch_sample, n),
            *in_modes(torch_sample, scale, small=(("default", QUICKEST),)),
            *(Provider(name, peer(name), missing=absent(needed)) for name, (needed, _) in FLOW_PEERS.items()),
        ),
        Work(4.0 * n * dim, n * weights.flops(), n * dim, memory=4.0 * n * (3 * HIDDEN + 6 * dim)),
    )


def density_problem(dim: int, n: int, scale: Scale) -> Problem:
    """The densities of n given samples."""
    weights = textbook.flow_weights(dim, COUPLINGS, HIDDEN, DEPTH)

    def setup() -> Workload:
        exact, order = weights.double(), textbook.shuffle(dim)
        rows = checks.some(n, CHECKED)

        def check(provider: Provider, log_prob: Tensor, x: Tensor) -> None:
            assert log_prob.shape == (n,), f"shape {tuple(log_prob.shape)}, not {(n,)}"
            assert log_prob.dtype == torch.float32, f"dtype {log_prob.dtype}, not float32"
            checks.finite(log_prob, "a log-density")
            wanted = textbook.flow_log_prob(exact, order, x[rows].double())
            checks.absolute_error(log_prob[rows], wanted, NATS[provider.precision], "a log-density")

        def inputs() -> tuple[Tensor]:
            return (textbook.flow_forward(weights, order, torch.randn(n, dim, device=DEVICE))[0],)

        return Workload(weights, input_sets(inputs), check)

    def peer(name: str) -> Callable[[FlowWeights], Call]:
        return lambda weights: FLOW_PEERS[name][1](weights).log_prob

    return Problem(
        "flow",
        f"log_prob, dim {dim}, batch {n:,}",
        {"batch": n, "dim": dim, "couplings": COUPLINGS, "hidden": HIDDEN, "depth": DEPTH},
        n,
        setup,
        (
            *_ours(our_density),
            *compiled_in_chunks(torch_density, n),
            *in_modes(torch_density, scale, small=(("default", QUICKEST),)),
            *(Provider(name, peer(name), missing=absent(needed)) for name, (needed, _) in FLOW_PEERS.items()),
        ),
        Work(4.0 * n * (dim + 1), n * weights.flops(), memory=4.0 * n * (3 * HIDDEN + 6 * dim)),
    )


def problems(scale: Scale) -> list[Problem]:
    """Samples and densities in dim 64 and 128; the large batch of a CPU's targets is in `medium`."""
    batches = SWEEP if scale == "sweep" else pick(scale, (4096,), (4096, 65_536), (1 << 20,))
    dims = (128,) if scale == "sweep" else (64, 128)
    kinds = (sample_problem,) if scale == "sweep" else (sample_problem, density_problem)
    return [kind(dim, n, scale) for kind in kinds for dim in dims for n in batches]


def test_flow(case: Any, timed: Any) -> None:
    timed(case)
