"""How far the networks of the shipped model are from float64, in each precision: what docs/kernels.md states.

python -m bench.accuracy
"""

import argparse
import copy

import torch
from torch import Tensor

from evalp_fast.kernels.philox import Stream, normal
from evalp_fast.pipeline import EVaLP
from evalp_fast.priors import EnergyPrior
from evalp_fast.samplers.base import draw


def relative(found: Tensor, exact: Tensor) -> str:
    """The largest error, relative to 1 + |exact|, and the root of the mean square of the errors."""
    error = found.double() - exact
    largest = (error.abs() / (1 + exact.abs())).max().item()
    return f"{largest:.1e} (rms {error.square().mean().sqrt().item():.1e})"


@torch.no_grad()
def main() -> None:
    """Print a Markdown table: errors of samples, log-determinants, round trips, energies; SIR's winners."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mnist", help="name or folder of the model (mnist)")
    parser.add_argument("-n", type=int, default=10_000, help="samples (10000)")
    parser.add_argument("--draws", type=int, default=1000, help="draws of SIR that are compared (1000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    prior = EVaLP.from_pretrained(options.model).to(options.device).prior
    if not isinstance(prior, EnergyPrior):
        parser.error(f"{options.model} has no flow and energy")
    z = normal(0, range(options.n), 0, Stream.PROPOSAL, prior.dim, device=options.device)
    exact = copy.deepcopy(prior).double()
    x, log_det = exact.flow(z.double())
    f = exact.energy(x)
    names = ("x", "x in norm", "x within 2e-2", "log_det", "inverse of forward", "energy", "SIR's winners")
    print(f"| {' | '.join(('precision', *names))} |\n{'|---' * (len(names) + 1)}|")
    winners = {}
    for precision in ("ieee", "bf16") if options.device == "cpu" else ("ieee", "tf32", "bf16"):
        found, found_log_det = prior.flow(z, precision=precision)
        back, _ = prior.flow.inverse(found, precision=precision)
        value = prior.energy(x.float(), precision=precision)
        sampler = prior.sampler("sir", precision=precision)
        winners[precision] = draw(sampler, options.draws, device=options.device).samples
        same = (winners[precision] - winners["ieee"]).abs().amax(1) < 0.1
        close = ((found - x).abs() <= 2e-2 * (1 + x.abs())).double().mean()
        norm = (found - x).norm() / x.norm()
        errors = relative(found, x), f"{norm:.1e}", f"{close:.2%}", relative(found_log_det, log_det)
        rest = relative(back, z.double()), relative(value, f), f"{same.double().mean():.1%}"
        print(f"| {' | '.join((precision, *errors, *rest))} |")


if __name__ == "__main__":
    main()
