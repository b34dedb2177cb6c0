"""A flow of eight affine couplings: samples, noise included, and densities of given samples.

Everybody has the same weights (`bench/flow_peers.py`), in float32; `bf16` means that the matrix products
alone are rounded, as `precision="bf16"` does. Samples are checked by the exact inverse: what it makes of
them, in float64 with the true weights, must be standard normal. Ours are compared with float64 from their
own noise, too.
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
from bench.sizes import SWEEP, Scale, pick
from bench.textbook import CLAMP, FlowWeights
from evalp_fast.kernels import launch
from evalp_fast.kernels.philox import Stream, normal

COUPLINGS, HIDDEN, DEPTH = 8, 256, 2
# Root mean square, relative.
LIMITS: dict[str, float] = {"ieee": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
CHECKED = 1 << 14

not_there = absent("evalp_fast.kernels.flow", "coupling_flow")


def our_parameters(weights: FlowWeights, precision: Precision) -> Any:
    """The weights as our kernel takes them; in bf16 with copies made once, as the module holds them."""
    from evalp_fast.kernels.flow import FlowParameters

    rounded = precision == "bf16"
    return FlowParameters(
        *(
            value.bfloat16() if rounded and name.startswith("weight") else value
            for name, value in vars(weights).items()
        )
    )


def our_sample(precision: Precision, backend: str | None = None) -> Callable[[FlowWeights], Call]:
    """The whole flow from the numbers of its samples."""

    def make(weights: FlowWeights) -> Call:
        from evalp_fast.kernels.flow import Noise, coupling_flow

        parameters = our_parameters(weights, precision)

        def call(index: range) -> Tensor:
            with launch.backend(backend):
                return coupling_flow(Noise(0, index), parameters, precision=precision, clamp=CLAMP)[0]

        return call

    return make


def our_density(precision: Precision, backend: str | None = None) -> Callable[[FlowWeights], Call]:
    """The inverse, and the base's density."""

    def make(weights: FlowWeights) -> Call:
        from evalp_fast.kernels.flow import coupling_flow

        parameters = our_parameters(weights, precision)

        def call(x: Tensor) -> Tensor:
            with launch.backend(backend):
                u, log_det = coupling_flow(x, parameters, inverse=True, precision=precision, clamp=CLAMP)
            return textbook.standard_normal_log_prob(u) + log_det

        return call

    return make


def module(weights: FlowWeights) -> Any:
    """`CouplingFlow` with these weights."""
    from evalp_fast.models.flow import CouplingFlow, FlowConfig

    flow = CouplingFlow(FlowConfig(weights.dim, COUPLINGS, HIDDEN, DEPTH, "relu", CLAMP)).to(DEVICE).eval()
    with torch.no_grad():
        for name, value in vars(weights).items():
            getattr(flow, name).copy_(value)
    return flow


def noise_of(index: range, dim: int) -> Tensor:
    """The noise of those samples."""
    return normal(0, index, 0, Stream.PROPOSAL, dim, device=DEVICE)


def composed_sample(weights: FlowWeights) -> Call:
    """The module in float32, layer by layer."""
    flow = module(weights)
    return lambda index: flow(noise_of(index, weights.dim))[0]


def torch_sample(product: textbook.Linear, mode: str | None = None) -> Callable[[FlowWeights], Call]:
    """The textbook's flow; its noise is made outside of what is compiled, which is faster on a CPU."""

    def make(weights: FlowWeights) -> Call:
        order = textbook.shuffle(weights.dim)

        def forward(u: Tensor) -> Tensor:
            return textbook.flow_forward(weights, order, u, product)[0]

        function = forward if mode is None else compiled(forward, None if mode == "default" else mode)
        return lambda index: function(torch.randn(len(index), weights.dim, device=DEVICE))

    return make


def torch_density(product: textbook.Linear, mode: str | None = None) -> Callable[[FlowWeights], Call]:
    """The textbook's density."""

    def make(weights: FlowWeights) -> Call:
        order = textbook.shuffle(weights.dim)

        def density(x: Tensor) -> Tensor:
            return textbook.flow_log_prob(weights, order, x, product)

        return density if mode is None else compiled(density, None if mode == "default" else mode)

    return make


def _modes(scale: Scale, make: Callable[..., Callable[[FlowWeights], Call]]) -> list[Provider]:
    """Eager and compiled, in both precisions; on a CPU at `small` the faster precision alone is compiled."""
    products: dict[Precision, textbook.Linear] = {"ieee": textbook.linear, "bf16": textbook.linear_bf16}
    found = [
        Provider(f"torch eager{'' if p == 'ieee' else ' bf16'}", make(product), p)
        for p, product in products.items()
    ]
    modes = ["default", "max-autotune"] if ON_CUDA else ["default"]
    for mode in modes:
        for p, product in products.items():
            if ON_CUDA or scale != "small" or p == "bf16":
                name = (
                    f"torch.compile{'' if mode == 'default' else ' ' + mode}{'' if p == 'ieee' else ' bf16'}"
                )
                found.append(Provider(name, make(product, mode), p, compiles=True))
    return found


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
            return lambda index: sample(len(index))

        return make

    def setup() -> Workload:
        exact, order = weights.double(), textbook.shuffle(dim)

        def check(provider: Provider, result: Any, index: range) -> None:
            x = result[0] if isinstance(result, tuple) else result
            assert x.shape == (n, dim), f"shape {tuple(x.shape)}, not {(n, dim)}"
            x = x[:CHECKED].double()
            checks.standard_normal_rows(textbook.flow_inverse(exact, order, x)[0])
            if provider.name.startswith("evalp_fast"):
                noise = noise_of(index[:CHECKED], dim).double()
                wanted = textbook.flow_forward(exact, order, noise)[0]
                checks.relative_error(x, wanted, LIMITS[provider.precision], "a sample")

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
            Provider("evalp_fast modules", composed_sample),
            *_modes(scale, torch_sample),
            *(Provider(name, peer(name), missing=absent(needed)) for name, (needed, _) in FLOW_PEERS.items()),
        ),
        Work(4.0 * n * dim, n * weights.flops(), n * dim, memory=4.0 * n * (3 * HIDDEN + 6 * dim)),
    )


def density_problem(dim: int, n: int, scale: Scale) -> Problem:
    """The densities of n given samples."""
    weights = textbook.flow_weights(dim, COUPLINGS, HIDDEN, DEPTH)

    def setup() -> Workload:
        exact, order = weights.double(), textbook.shuffle(dim)

        def check(provider: Provider, log_prob: Tensor, x: Tensor) -> None:
            assert log_prob.shape == (n,), f"shape {tuple(log_prob.shape)}, not {(n,)}"
            wanted = textbook.flow_log_prob(exact, order, x[:CHECKED].double())
            checks.relative_error(log_prob[:CHECKED], wanted, LIMITS[provider.precision], "a log-density")

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
            Provider("evalp_fast modules", lambda weights: module(weights).log_prob),
            *_modes(scale, torch_density),
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
