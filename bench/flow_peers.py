"""One flow in the libraries that people know: the same architecture, the weights copied, the same dtype.

Each `make` gives a `PeerFlow` whose `sample(n)` and `log_prob(x)` are the library's own documented calls.
Where a library has another scale function or another direction than `textbook.flow_forward`, it is adapted
by the hook that it documents for that, so that all compute the same map:

- normflows: `AffineCouplingBlock(scale_map="exp")`, the clamp a last module of the conditioner; `Permute`.
- nflows: `AffineCouplingTransform` with its scale function overridden; an `InverseTransform` around the
  stack, so that the fast direction of the parameters is that of sampling; `Permutation`.
- zuko: `GeneralCouplingTransform` with a univariate transform of its own, written from data to noise, as
  zuko's flows are: `.inv` of a stack from noise to data would run every conditioner twice for a density.
- FrEIA: `AffineCouplingOneSided(clamp_activation="TANH")`, whose argument is not divided by the clamp, so
  the weights are; `PermuteRandom` with our order.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from bench.machine import DEVICE
from bench.textbook import CLAMP, FlowWeights, shuffle, standard_normal_log_prob


class PeerFlow(NamedTuple):
    """What is timed: samples by number (`[n, D]`, or a tuple that begins with them), and densities `[N]`; the
    noise that `sample` begins with, `[n, D]`, drawn as it draws it; and the module whose parameters a
    training step moves."""

    sample: Callable[[int], Any]
    log_prob: Callable[[Tensor], Tensor]
    base: Callable[[int], Tensor]
    network: nn.Module


class SoftClamp(nn.Module):
    """`c·tanh(s/c)` of every second column, which normflows reads as log-scales."""

    def forward(self, parameters: Tensor) -> Tensor:
        log_scale = CLAMP * torch.tanh(parameters[:, 1::2] / CLAMP)
        return torch.stack((parameters[:, 0::2], log_scale), dim=2).flatten(1)


def _conditioner(layer: tuple[Tensor, ...], rows: Tensor | None = None) -> nn.Sequential:
    """One coupling's MLP as modules, the rows of its last layer in the order of `rows`."""
    weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out = layer
    if rows is not None:
        weight_out, bias_out = weight_out[rows], bias_out[rows]
    pairs = [(weight_in, bias_in), *zip(weight_hidden, bias_hidden, strict=True), (weight_out, bias_out)]
    modules: list[nn.Module] = []
    for weight, bias in pairs:
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _shift_first(changed: int) -> Tensor:
    """From (log-scales, shifts) to (shifts, log-scales)."""
    return torch.cat((torch.arange(changed, 2 * changed), torch.arange(changed)))


def _pairs(changed: int) -> Tensor:
    """From (log-scales, shifts) to (shift, log-scale) of each column in turn."""
    return torch.stack((torch.arange(changed, 2 * changed), torch.arange(changed)), dim=1).flatten()


def normflows(weights: FlowWeights) -> PeerFlow:
    """normflows 1.7: https://github.com/VincentStimper/normalizing-flows"""
    nf: Any = importlib.import_module("normflows")

    order = shuffle(weights.dim)
    flows: list[nn.Module] = []
    for layer in weights.layers():
        network = nn.Sequential(*_conditioner(layer, _pairs(layer[4].shape[0] // 2)), SoftClamp())
        permute = nf.flows.Permute(weights.dim, mode="shuffle")
        permute.perm, permute.inv_perm = order, torch.argsort(order)
        flows += [nf.flows.AffineCouplingBlock(network), permute]
    base = nf.distributions.DiagGaussian(weights.dim, trainable=False)
    model = nf.NormalizingFlow(base, flows).to(DEVICE).eval()
    return PeerFlow(model.sample, model.log_prob, lambda n: base(n)[0], model)


def nflows(weights: FlowWeights) -> PeerFlow:
    """nflows 0.14: https://github.com/bayesiains/nflows"""
    nf: Any = importlib.import_module("nflows.flows")
    tf: Any = importlib.import_module("nflows.transforms")
    permutations: Any = importlib.import_module("nflows.transforms.permutations")
    normal: Any = importlib.import_module("nflows.distributions.normal")

    class Network(nn.Module):
        def __init__(self, modules: nn.Sequential):
            super().__init__()
            self.layers = modules

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.layers(x)

    class Coupling(tf.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            shift, log_scale = transform_params.chunk(2, dim=1)
            return torch.exp(CLAMP * torch.tanh(log_scale / CLAMP)), shift

    passed = weights.weight_in.shape[2]
    mask = (torch.arange(weights.dim) >= passed).int()
    transforms: list[nn.Module] = []
    for layer in weights.layers():
        network = Network(_conditioner(layer, _shift_first(layer[4].shape[0] // 2)))
        transforms += [
            Coupling(mask, lambda i, o, network=network: network),
            permutations.Permutation(shuffle(weights.dim)),
        ]
    base = normal.StandardNormal([weights.dim])
    model = nf.Flow(tf.InverseTransform(tf.CompositeTransform(transforms)), base).to(DEVICE).eval()
    return PeerFlow(model.sample, model.log_prob, base.sample, model)


def zuko(weights: FlowWeights) -> PeerFlow:
    """zuko 1.6: https://github.com/probabilists/zuko"""
    zk: Any = importlib.import_module("zuko")

    class ClampedAffine(torch.distributions.Transform):
        """(x - t)·exp(-c·tanh(s/c)): the inverse of zuko's `MonotonicAffineTransform`, with another clamp."""

        domain = constraints.real
        codomain = constraints.real
        bijective = True
        sign = +1  # pyright: ignore

        def __init__(self, shift: Tensor, scale: Tensor):
            super().__init__()
            self.shift, self.log_scale = shift, CLAMP * torch.tanh(scale / CLAMP)

        def _call(self, x: Tensor) -> Tensor:
            return (x - self.shift) * torch.exp(-self.log_scale)

        def _inverse(self, y: Tensor) -> Tensor:
            return y * self.log_scale.exp() + self.shift

        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
            return -self.log_scale.expand(x.shape)

    passed = weights.weight_in.shape[2]
    mask = torch.arange(weights.dim) < passed  # ones are the constant part
    transforms: list[nn.Module] = []
    for layer in reversed(weights.layers()):
        coupling = zk.flows.GeneralCouplingTransform(weights.dim, mask=mask, univariate=ClampedAffine)
        coupling.hyper = _conditioner(layer, _pairs(layer[4].shape[0] // 2))
        permute = zk.lazy.UnconditionalTransform(
            zk.transforms.PermutationTransform, torch.argsort(shuffle(weights.dim)), buffer=True
        )
        transforms += [permute, coupling]
    base = zk.lazy.UnconditionalDistribution(
        zk.distributions.DiagNormal, torch.zeros(weights.dim), torch.ones(weights.dim), buffer=True
    )
    model = zk.flows.Flow(zk.lazy.LazyComposedTransform(*transforms), base).to(DEVICE).eval()
    return PeerFlow(
        lambda n: model().sample((n,)),
        lambda x: model().log_prob(x),
        lambda n: model().base.sample((n,)),
        model,
    )


def freia(weights: FlowWeights) -> PeerFlow:
    """FrEIA 0.2: https://github.com/vislearn/FrEIA, which leaves the base density to its user."""
    framework: Any = importlib.import_module("FrEIA.framework")
    modules: Any = importlib.import_module("FrEIA.modules")

    model = framework.SequenceINN(weights.dim)
    passed = weights.weight_in.shape[2]
    order = shuffle(weights.dim)
    for layer in weights.layers():
        network = _conditioner(layer)
        changed = layer[4].shape[0] // 2
        last = network[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight[:changed] /= CLAMP
            last.bias[:changed] /= CLAMP
        model.append(
            modules.AffineCouplingOneSided,
            subnet_constructor=lambda i, o, network=network: network,
            clamp=CLAMP,
            clamp_activation="TANH",
            split_len=passed,
        )
        model.append(modules.PermuteRandom)
        model[-1].perm.data, model[-1].perm_inv.data = order, torch.argsort(order)
    model = model.to(DEVICE).eval()

    def log_prob(x: Tensor) -> Tensor:
        u, log_det = model(x, rev=True)
        return standard_normal_log_prob(u) + log_det

    def base(n: int) -> Tensor:
        return torch.randn(n, weights.dim, device=DEVICE)

    return PeerFlow(lambda n: model(base(n)), log_prob, base, model)


FLOW_PEERS: dict[str, tuple[str, Callable[[FlowWeights], PeerFlow]]] = {
    "normflows": ("normflows", normflows),
    "nflows": ("nflows.flows", nflows),
    "zuko": ("zuko", zuko),
    "FrEIA": ("FrEIA.framework", freia),
}
"""Name to the module that must be there, and its `make`."""
