"""How far the networks of the shipped model are from float64, in each precision: what docs/kernels.md states.

python -m bench.accuracy
"""

import argparse
import contextlib
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from evalp_fast.kernels.philox import Stream, normal
from evalp_fast.kernels.processor import precision_on
from evalp_fast.pipeline import EVaLP
from evalp_fast.priors import EnergyPrior
from evalp_fast.samplers.base import draw


def relative(found: Tensor, exact: Tensor) -> str:
    """The largest error, relative to 1 + |exact|, and the root of the mean square of the errors."""
    error = found.double() - exact
    largest = (error.abs() / (1 + exact.abs())).max().item()
    return f"{largest:.1e} (rms {error.square().mean().sqrt().item():.1e})"


class TF32Operands(TorchFunctionMode):
    """Within the block linear layers read their operands in TF32: all but those of a single output, an
    energy's last.

    Args:
        rounded: to the nearest, halves away from zero, as the kernels do with `"tf32"`; else cut off, as
            matrix units do with float32.
    """

    def __init__(self, rounded: bool = True) -> None:
        super().__init__()
        self._half = 0x1000 if rounded else 0

    def read(self, finite: Tensor) -> Tensor:
        """With 10 bits of a significand."""
        bits = (finite.float().view(torch.int32) + self._half) & ~0x1FFF
        return bits.view(torch.float32).to(finite.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer. Not differentiable."""
        return F.linear(self.read(x), self.read(weight), bias)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1].shape[0] > 1:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
    emulated: dict[str, TF32Operands] = {}
    if options.device == "cpu":  # where "tf32" is float32
        emulated = {"tf32, emulated": TF32Operands(), "the same, cut off": TF32Operands(rounded=False)}
    winners = {}
    device = torch.device(options.device)
    rounded = ("bf16",) if precision_on(device, "bf16") == "bf16" else ()
    for name in ("ieee", *(emulated or ("tf32",)), *rounded):
        precision: Any = "tf32" if name in emulated else name
        model = exact if name in emulated else prior
        with emulated.get(name, contextlib.nullcontext()):
            found, found_log_det = model.flow(z.to(model.dtype), precision=precision)
            back, _ = model.flow.inverse(found, precision=precision)
            value = model.energy(x.to(model.dtype), precision=precision)
            sampler = model.sampler("sir", precision=precision)
            winners[name] = draw(sampler, options.draws, device=options.device).samples
        same = (winners[name] - winners["ieee"]).abs().amax(1) < 0.1
        close = ((found - x).abs() <= 2e-2 * (1 + x.abs())).double().mean()
        norm = (found - x).norm() / x.norm()
        errors = relative(found, x), f"{norm:.1e}", f"{close:.2%}", relative(found_log_det, log_det)
        # What is emulated has its state in float64.
        round_trip = "" if name in emulated else relative(back, z.double())
        rest = round_trip, relative(value, f), f"{same.double().mean():.1%}"
        print(f"| {' | '.join((name, *errors, *rest))} |")
    if not rounded:
        print('\n"bf16" is float32 on this processor, whose products of bfloat16 are slower.')


if __name__ == "__main__":
    main()
