"""Every kernel once, on small and awkward shapes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m bench.sanitize
compute-sanitizer --tool racecheck python -m bench.sanitize
"""

import sys
from unittest import mock

import torch

from evalp_fast.kernels import launch
from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.flow import Noise, coupling_flow
from evalp_fast.kernels.importance import categorical, resample, summarize
from evalp_fast.kernels.langevin import langevin_step, mala_accept
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.launch import backend
from evalp_fast.kernels.philox import Stream, exponential, normal, uniform
from evalp_fast.kernels.resampling import SCHEMES
from evalp_fast.kernels.sir import sir
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig

# Neither powers of two nor multiples of a block; the longest row takes the kernels for long rows.
ROWS, WIDTH, ROW_LENGTHS = 37, 19, (7, 100, 20_011)


def noise(index: torch.Tensor) -> None:
    """Fills with an index in memory and one that is a range."""
    for draw in (normal, uniform, exponential):
        draw(0, index, 0, Stream.PROPOSAL, WIDTH)
        draw(0, range(5, 5 + ROWS), 0, Stream.PROPOSAL, WIDTH, device=index.device)


def coupling(device: torch.device) -> None:
    """Both directions and their gradients: strided halves, with and without a mask, in two types."""
    mask = torch.arange(WIDTH, device=device) % 2 == 0
    for dtype in (torch.float32, torch.bfloat16):
        for kept in (None, mask):
            for inverse in (False, True):
                wide = torch.randn(3, ROWS, 2 * WIDTH, device=device, dtype=dtype, requires_grad=True)
                x, log_scale, shift = wide[:, :, :WIDTH]
                y, log_det = affine_coupling(x, log_scale, shift, inverse=inverse, clamp=2.0, mask=kept)
                (y.float().sum() + log_det.sum()).backward()


def weights(device: torch.device) -> None:
    """The summary with its gradient, every scheme, and the race, for short rows and a long one."""
    for length in ROW_LENGTHS:
        log_weights = torch.randn(3, length, device=device, requires_grad=True)
        summary = summarize(log_weights)
        (summary.log_mean + summary.ess).sum().backward()
        for scheme in SCHEMES:
            for num in (1, length + 1):
                resample(log_weights, num, scheme=scheme)  # pyright: ignore[reportArgumentType]
        categorical(log_weights)


def langevin(index: torch.Tensor) -> None:
    """The step of two tensors at once, in and out of place, and the acceptance in place."""
    states = [torch.randn(ROWS, width, device=index.device) for width in (WIDTH, 300)]
    for out in (None, states):
        langevin_step(
            states, states, 0.1, seed=0, index=index, step=0, clamp=(-3.0, 3.0), grad_clip=1.0, out=out
        )
    x, proposal = torch.randn(2, ROWS, WIDTH, device=index.device)
    energy, other = torch.randn(2, ROWS, device=index.device)
    grad = x.clone()
    for out in (None, (x, energy, grad)):
        mala_accept(
            x,
            energy,
            grad,
            proposal,
            other,
            proposal,
            0.1,
            seed=0,
            index=index,
            step=0,
            grad_clip=1.0,
            out=out,
        )


def launches(index: torch.Tensor) -> None:
    """The flow, of both forms, and its backward passes, the energy, SIR and the chain: odd sizes, every
    precision.

    Two to four programs for all rows, so that each takes one tile after another.
    """
    device = index.device
    flow = CouplingFlow(FlowConfig(WIDTH, couplings=2, hidden=40, activation="silu")).to(device)
    deep = CouplingFlow(FlowConfig(WIDTH, couplings=3, hidden=136, depth=3)).to(device)
    energy = MLPEnergy(EnergyConfig(WIDTH, hidden=40)).to(device)
    # Triton's interpreter has no products of bfloat16.
    for precision in ("ieee", "tf32", "bf16") if device.type == "cuda" else ("ieee",):
        z, log_det = flow(
            torch.randn(len(index), WIDTH, device=device, requires_grad=True), precision=precision
        )
        (z.sum() + log_det.sum()).backward()
        (flow.log_prob(z.detach().requires_grad_(), precision=precision).sum()).backward()
        with torch.no_grad():
            flow_parameters = flow.parameters_stacked(precision)
            energy_parameters = energy.parameters_in_order(precision)
            coupling_flow(Noise(0, index), flow_parameters, **flow.options(precision))
            energy.gradient(z, precision=precision)
            coupling_flow(Noise(0, index), deep.parameters_stacked(precision), **deep.options(precision))
            deep.log_prob(z, precision=precision)
            for parameters, proposals in (
                (flow_parameters, 3),
                (flow_parameters, 40),
                (deep.parameters_stacked(precision), 3),
            ):
                sir(0, 5, len(index), proposals, parameters, energy_parameters, precision=precision)
            for adjusted in (False, True):
                langevin_chain(
                    z, energy_parameters, n_steps=3, step_size=0.1, adjusted=adjusted, precision=precision
                )


def main() -> None:
    """Runs them on the GPU; with TRITON_INTERPRET=1 and no GPU, in Triton's interpreter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.arange(ROWS, device=device)
    with backend("triton"):
        noise(index)
        coupling(device)
        weights(device)
        with torch.no_grad():
            langevin(index)
        rows = 5 * 128 + 3 if device.type == "cuda" else ROWS  # the largest tile has 128
        with mock.patch.object(launch, "_multiprocessors", return_value=1):
            launches(torch.arange(rows, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    sys.exit(main())
