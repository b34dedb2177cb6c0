"""The latent prior: its density, its weights, its normalising constant, and how it is sampled."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from evalp_fast.kernels import philox
from evalp_fast.kernels.checks import check_bool, check_integer, check_positive
from evalp_fast.kernels.flow import Noise, flow_has_no_kernel
from evalp_fast.kernels.latent_chain import chain_fits, langevin_chain
from evalp_fast.kernels.launch import why_reference
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.kernels.processor import precision_on, quick_precision
from evalp_fast.kernels.sir import Weighting, log_weight_of, sir, sir_fits, weighting
from evalp_fast.metrics.mmd import MMD2, mmd2
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig, standard_normal_log_prob
from evalp_fast.models.precision import Precision, check_precision
from evalp_fast.partition import LogPartition, log_partition_of
from evalp_fast.rounding import flow_draws_as_well, weights_are_as_good
from evalp_fast.samplers.base import Draws, Sampler, check_count, draw, stream
from evalp_fast.samplers.direct import FlowSampler, FunctionSampler, GaussianSampler
from evalp_fast.samplers.langevin import LangevinSampler
from evalp_fast.samplers.sir import SIRSampler

Method = Literal["prior", "flow", "sir", "langevin"]
METHODS: tuple[str, ...] = get_args(Method)

_LOW_ESS = 0.05  # of the number of proposals


@dataclass(frozen=True)
class SamplingOptions:
    """What the methods of sampling may be told beyond a seed; each method reads its own.

    Attributes:
        temperature: T of the law p(z)^(1/T); for `prior` and `flow` the noise is N(0, T·I).
        proposals: (sir) draws of the flow per sample.
        weights: (sir) `"exact"` is p/g; `"energy"` is exp(-f) alone, as the published code has it, which
            leaves out the density ratio of base and proposal and so samples another law.
        n_steps, step_size: (langevin) as in `samplers.langevin.langevin`.
        adjusted: (langevin) Metropolis-adjusted, exact at any step size.
        space: (langevin) `"latent"` moves z on p(z); `"noise"` moves u on the same law seen through the
            flow, which is closer to a Gaussian, and maps the end through it.
        initial: (langevin) where chains start: the flow's draws, or the Gaussian prior's.
    """

    temperature: float = 1.0
    proposals: int = 100
    weights: Literal["exact", "energy"] = "exact"
    n_steps: int = 60
    step_size: float = 0.1
    adjusted: bool = False
    space: Literal["latent", "noise"] = "noise"
    initial: Literal["flow", "prior"] = "flow"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_integer("proposals", self.proposals, 1)
        check_integer("n_steps", self.n_steps, 0)
        check_positive("step_size", self.step_size)
        check_bool("adjusted", self.adjusted)
        for name, choices in (
            ("weights", ("exact", "energy")),
            ("space", ("latent", "noise")),
            ("initial", ("flow", "prior")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class PriorConfig:
    """Shape of an `EnergyPrior`.

    Attributes:
        flow, energy: the two networks, of one latent dimension.
        base: `"gaussian"`: p(z) ∝ N(z; 0, I)·exp(-f(z)/w), the prior of EVaLP. `"flow"`: p(z) ∝
            g(z)·exp(-f(z)), an energy that is a residual on the flow; the same family, written so that
            f = 0 is the flow and the importance weights are exp(-f).
        kl_weight: w, the weight that the KL had in the training of the sampler, in (0, 1]. That training
            fits g to N·exp(-f/w), so f/w is the energy of the prior, and w an inverse temperature.
    """

    flow: FlowConfig
    energy: EnergyConfig
    base: Literal["gaussian", "flow"] = "gaussian"
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.flow.dim != self.energy.dim:
            raise ValueError(f"flow.dim {self.flow.dim} and energy.dim {self.energy.dim} must be equal")
        if self.base not in ("gaussian", "flow"):
            raise ValueError(f"base must be 'gaussian' or 'flow', got {self.base!r}")
        if not 0.0 < self.kl_weight <= 1.0:
            raise ValueError(f"kl_weight must be in (0, 1], got {self.kl_weight}")
        if self.base == "flow" and self.kl_weight != 1.0:
            raise ValueError(f"kl_weight must be 1 with base='flow', got {self.kl_weight}")


class PriorDiagnostics(NamedTuple):
    """How good a prior is: see `EnergyPrior.diagnostics`."""

    log_partition: LogPartition
    mean_ess: float
    lowest_ess: float
    proposals: int
    prior_hole: dict[str, MMD2]
    negative_log_likelihood: float | None


class EnergyPrior(nn.Module):
    """p(z) = base(z)·exp(-energy(z)) / Z with a normalizing flow g as its sampler.

    Densities and weights take latents `[N, D]` and return `[N]`. All is float32, or float64 where the
    parameters are (`double()`), which has no kernel.
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        self.flow = CouplingFlow(config.flow)
        self.energy_net = MLPEnergy(config.energy)

    @property
    def dim(self) -> int:
        """The latent dimension D."""
        return self.config.flow.dim

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU, where a user's own networks have none."""
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of latents: float64 where the parameters are, else float32."""
        first = next(self.parameters(), None)
        return torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32

    def energy(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """The exponent of the tilt: f(z)/w."""
        return self.energy_net(z, precision=precision) / self.config.kl_weight

    def log_prob_unnormalized(
        self, z: Tensor, log_g: Tensor | None = None, *, precision: Precision | None = None
    ) -> Tensor:
        """log base(z) - energy(z) = log p(z) + log Z. `log_g` saves the flow's inverse where it is known."""
        if self.config.base == "gaussian":
            base = standard_normal_log_prob(z)
        else:
            base = self.flow.log_prob(z, precision=precision) if log_g is None else log_g
        return base - self.energy(z, precision=precision)

    def log_prob(
        self, z: Tensor, *, log_partition: float | None = None, precision: Precision | None = None
    ) -> Tensor:
        """log p(z) of the rows of `z`, `[N]`: normalised with the log Z that is given, else estimated by
        `log_partition()` (of which `low` and `high` say how well it is known)."""
        if log_partition is None:
            log_partition = self.log_partition().value
        return self.log_prob_unnormalized(z, precision=precision) - log_partition

    def rsample(
        self, n: int, *, seed: int = 0, start: int = 0, precision: Precision | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws of the flow with a gradient to its parameters, and their density under it, from one pass.

        Returns:
            `(z [n, D], log g(z) [n])`: the numbers `start .. start+n-1` of `sample`'s series `seed`, up to
            the rounding of its precision (by default "ieee" here) and of one batch.
        """
        check_count(n, start, seed=seed)
        index = torch.arange(start, start + n, device=self.device)
        u = philox.normal(int(seed), index, 0, philox.Stream.PROPOSAL, self.dim, dtype=self.dtype)
        z, log_det = self.flow(u, precision=precision)
        return z, standard_normal_log_prob(u) - log_det

    @torch.no_grad()
    def sample_and_log_prob(
        self, n: int, *, seed: int = 0, start: int = 0, precision: Precision | None = None
    ) -> tuple[Tensor, Tensor]:
        """`rsample` without gradients: the density is that of the sample as drawn, also in bf16."""
        with matmul_precision(precision):
            return self.rsample(n, seed=seed, start=start, precision=precision)

    def log_weight(
        self,
        z: Tensor,
        u: Tensor,
        log_det: Tensor,
        *,
        temperature: float = 1.0,
        precision: Precision | None = None,
    ) -> Tensor:
        """log of p(z)^(1/T)·Z^(1/T) / g_T(z) for the proposals `z = g(u)`, `u ~ N(0, T·I)`.

        With T = 1 and the Gaussian base: `-f(z)/w - |z|²/2 + |u|²/2 + log|det dz/du|`; with the flow as
        base: `-f(z)`.
        """
        rule = self._weighting("exact", temperature)
        return log_weight_of(rule, z, u, log_det, self.energy(z, precision=precision)) + rule.offset

    def _weighting(self, weights: str, temperature: float) -> Weighting:
        """Of `energy`, which is f/w."""
        return weighting(self.config.base, weights, 1.0, temperature, self.dim)

    def default_precision(self, method: Method, options: SamplingOptions | None = None) -> Precision:
        """Of draws by `method` that are not told one: "bf16" where that is faster, and changes neither the
        flow's law nor SIR's weights, by a look at some of them (`evalp_fast/rounding.py`); else "ieee". Also
        "ieee" are chains, float64, and a flow or an energy of a user's own class."""
        unknown = self.dtype == torch.float64 or self._replaced("flow", "energy_net") is not None
        if method == "langevin" or unknown or quick_precision(self.device) == "ieee":
            return "ieee"
        temperature = 1.0 if options is None else options.temperature
        good = method == "prior" or flow_draws_as_well(self.flow, temperature)
        if good and method == "sir":
            scale = 1.0 / (self.config.kl_weight * temperature)
            good = weights_are_as_good(self.flow, self.energy_net, scale, temperature)
        return "bf16" if good else "ieee"

    def sampler(
        self,
        method: Method = "flow",
        *,
        precision: Precision | None = None,
        options: SamplingOptions | None = None,
    ) -> Sampler:
        """The sampler that `method` names, in `precision` or else in `default_precision`.

        Raises:
            ValueError: for an unknown method or precision, or an option out of its range.
        """
        check_precision(precision)
        options = SamplingOptions() if options is None else options
        if precision is None:
            precision = self.default_precision(method, options)
        if method == "prior":
            return GaussianSampler(self.dim, options.temperature, self.dtype)
        if method == "flow":
            return self._flow_sampler(options, precision)
        if method == "sir":
            return self._sir_sampler(options, precision)
        if method == "langevin":
            return self._langevin_sampler(options, precision)
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")

    def _info(self, unsupported: str | None, precision: Precision) -> dict[str, str]:
        """What `Draws.info` says of a method whose kernel has this against it, if anything."""
        reason = why_reference(torch.empty(0, device=self.device), unsupported=unsupported)
        if reason is None:
            return {"path": "one launch", "precision": precision}
        composed = {"path": "composed", "reason": reason}
        if self._replaced("flow", "energy_net") is None:
            composed["precision"] = precision_on(self.device, precision)
        return composed

    def _replaced(self, *names: Literal["flow", "energy_net"]) -> str | None:
        """Which of these networks is a user's own module, or one with changes that no kernel sees; None where
        none is."""
        for name in names:
            module, kind = getattr(self, name), CouplingFlow if name == "flow" else MLPEnergy
            if type(module) is not kind:
                return f"{name} is a {type(module).__name__}, not a {kind.__name__}"
            unseen = module.unseen()
            if unseen is not None:
                return f"{name} {unseen}"
        return None

    def _flow_sampler(self, options: SamplingOptions, precision: Precision) -> Sampler:
        replaced = self._replaced("flow")
        if replaced is not None:
            proposal = partial(self.flow, precision=precision)
            composed = FlowSampler(proposal, self.dim, options.temperature, self.dtype)
            return FunctionSampler(composed, self._info(replaced, precision), composed.tiles)

        def draw_flow(seed: int, index: Tensor) -> Draws:
            noise = Noise(seed, index)
            return Draws(self.flow(noise, precision=precision, temperature=options.temperature)[0], {})

        no_kernel = flow_has_no_kernel(self.flow.parameters_stacked(), precision)
        return FunctionSampler(draw_flow, self._info(no_kernel, precision), FlowSampler.tiles)

    def _sir_sampler(self, options: SamplingOptions, precision: Precision) -> Sampler:
        temperature = options.temperature
        replaced = self._replaced("flow", "energy_net")
        if replaced is not None:
            rule = self._weighting(options.weights, temperature)

            def log_weight(z: Tensor, u: Tensor, log_det: Tensor) -> Tensor:
                return log_weight_of(rule, z, u, log_det, self.energy(z, precision=precision))

            composed = SIRSampler(
                partial(self.flow, precision=precision),
                log_weight,
                self.dim,
                options.proposals,
                temperature,
                rule.offset,
                self.dtype,
            )
            return FunctionSampler(composed, self._info(replaced, precision))
        flow, energy = self.config.flow, self.config.energy

        def draw_sir(seed: int, index: Tensor) -> Draws:
            drawn = sir(
                seed,
                0,
                index.shape[0],
                options.proposals,
                self.flow.parameters_stacked(precision),
                self.energy_net.parameters_in_order(precision),
                base=self.config.base,
                weights=options.weights,
                energy_scale=1.0 / self.config.kl_weight,
                temperature=temperature,
                precision=precision,
                flow_activation=flow.activation,
                energy_activation=energy.activation,
                clamp=flow.clamp,
                mixing=flow.mixing,
                index=index,
            )
            found = drawn.diagnostics
            diagnostics = {
                "ess": found.ess,
                "log_mean_weight": found.log_mean_weight,
                "non_finite": found.non_finite,
            }
            return Draws(drawn.z, diagnostics)

        networks = self.flow.parameters_stacked(), self.energy_net.parameters_in_order()
        no_kernel = sir_fits(*networks)
        return FunctionSampler(draw_sir, self._info(no_kernel, precision))

    def _langevin_sampler(self, options: SamplingOptions, precision: Precision) -> Sampler:
        def potential(z: Tensor) -> Tensor:
            return -self.log_prob_unnormalized(z, precision=precision)

        def noise_potential(u: Tensor) -> Tensor:
            z, log_det = self.flow(u, precision=precision)
            log_g = standard_normal_log_prob(u) - log_det
            log_p = self.log_prob_unnormalized(z, log_g, precision=precision)
            # The chain divides all of it by T, and the volume element must not be tempered.
            return -(log_p + options.temperature * log_det)

        in_noise = options.space == "noise"
        initial: Sampler
        if in_noise and options.initial == "flow":
            initial = GaussianSampler(self.dim, dtype=self.dtype)  # u ~ N(0, I) is a draw of the flow
        elif in_noise:
            initial = self._prior_in_noise_space(precision)
        else:
            initial = self.sampler(options.initial, precision=precision)
        reason = self._replaced("energy_net")
        if in_noise:
            reason = "its chains move in noise space, through the flow"
        elif self.config.base == "flow":
            reason = "the flow is part of the energy"
        if reason is None:
            return self._chain_sampler(initial, options, precision)
        composed = LangevinSampler(
            initial,
            noise_potential if in_noise else potential,
            n_steps=options.n_steps,
            step_size=options.step_size,
            temperature=options.temperature,
            adjusted=options.adjusted,
            transform=(lambda u: self.flow(u, precision=precision)[0]) if in_noise else None,
        )
        through_flow = in_noise or self.config.base == "flow"
        return FunctionSampler(composed, self._info(reason, precision), self._chain_tiles(through_flow))

    def _chain_tiles(self, through_flow: bool) -> int:
        """Default tiles whose chains run together; a step of theirs goes through the energy, or the flow too.

        A step is many small calls, which cost a CPU as much for fewer rows. With a million parameters the
        products cost more than the calls: there, and for networks of which nothing is known, more rows would
        only make a few samples dearer. On a GPU the default is large enough.
        """
        networks = (self.energy_net, self.flow) if through_flow else (self.energy_net,)
        numbers = sum(parameter.numel() for network in networks for parameter in network.parameters())
        known = self._replaced("flow", "energy_net") is None
        return 4 if known and numbers < 1 << 20 and self.device.type == "cpu" else 1

    def _chain_sampler(self, initial: Sampler, options: SamplingOptions, precision: Precision) -> Sampler:
        """Chains on N(z; 0, I)·exp(-f(z)/w), all steps in one launch."""
        energy = self.config.energy

        def draw_chain(seed: int, index: Tensor) -> Draws:
            chains = langevin_chain(
                initial(seed, index).samples,
                self.energy_net.parameters_in_order(precision),
                n_steps=options.n_steps,
                step_size=options.step_size,
                temperature=options.temperature,
                adjusted=options.adjusted,
                energy_scale=1.0 / self.config.kl_weight,
                precision=precision,
                activation=energy.activation,
                seed=seed,
                index=index,
            )
            # An adjusted chain goes nowhere where the energy is not finite, so it has not left its start.
            stuck = ~chains.energy.isfinite() if options.adjusted else chains.energy.isnan()
            lost = ~chains.samples.isfinite().all(dim=1) | stuck
            if bool(lost.any()):
                kind = "NaN or infinite" if options.adjusted else "NaN"
                raise ValueError(
                    f"{int(lost.sum())} of {len(lost)} chains are no longer finite, or began where the "
                    f"energy is {kind}: lower step_size ({options.step_size})"
                )
            return Draws(chains.samples, {"acceptance": chains.acceptance})

        no_kernel = chain_fits(energy.dim, energy.hidden, energy.depth, self.device, self.dtype)
        return FunctionSampler(
            draw_chain, self._info(no_kernel, precision), self._chain_tiles(through_flow=False)
        )

    def _prior_in_noise_space(self, precision: Precision) -> Sampler:
        gaussian = GaussianSampler(self.dim, dtype=self.dtype)

        def draw_noise(seed: int, index: Tensor) -> Draws:
            return Draws(self.flow.inverse(gaussian(seed, index).samples, precision=precision)[0], {})

        return draw_noise

    def draw(
        self,
        n: int,
        *,
        method: Method = "flow",
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        precision: Precision | None = None,
        progress: bool = False,
        **options,
    ) -> Draws:
        """Latents with their diagnostics; arguments as for `sample`."""
        settings = sampling_options(options)
        draws = draw(
            self.sampler(method, precision=precision, options=settings),
            n,
            seed=seed,
            start=start,
            batch_size=batch_size,
            device=self.device,
            precision=precision,
            progress=progress,
        )
        if method == "sir" and n > 0:
            warn_of_low_ess(draws.diagnostics["ess"], settings.proposals)
        return draws

    def sample(self, n: int, **arguments) -> Tensor:
        """`n` latents `[n, D]`, float32 (float64 from float64 parameters).

        Args:
            n: how many; 0 gives an empty tensor.
            method: `"prior"` (the Gaussian), `"flow"`, `"sir"` or `"langevin"`.
            seed, start: sample i of the result is number `start + i` of the series `seed`, the same for
                any `n` and `batch_size`, to the last bit on one machine with one number of threads.
            batch_size: samples held at once beside the result.
            precision: of matrix products, `"ieee"`, `"tf32"` or `"bf16"`; by default `default_precision`.
            progress: show a progress bar.
            options: the fields of `SamplingOptions`.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return self.draw(n, **arguments).samples

    def stream(
        self,
        n: int,
        *,
        method: Method = "flow",
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        precision: Precision | None = None,
        progress: bool = False,
        **options,
    ) -> Iterator[Draws]:
        """`draw` in batches, for more latents than fit in memory."""
        return stream(
            self.sampler(method, precision=precision, options=sampling_options(options)),
            n,
            seed=seed,
            start=start,
            batch_size=batch_size,
            device=self.device,
            precision=precision,
            progress=progress,
        )

    def log_partition(self, n: int = 65_536, *, seed: int = 0, replicates: int = 200) -> LogPartition:
        """log Z by importance sampling with `n` draws of the flow, and its variational bounds.

        Z is relative to the normalised base: with f = 0, log Z = 0.

        Raises:
            ValueError: when no weight is positive and finite.
        """
        if n < 2:
            raise ValueError(f"n must be at least 2, got {n}")

        def weigh(seed: int, index: Tensor) -> Draws:
            u = philox.normal(seed, index, 0, philox.Stream.PROPOSAL, self.dim, dtype=self.dtype)
            return Draws(self.log_weight(*self._pass(u)), {})

        log_weights = draw(weigh, n, seed=seed, device=self.device).samples
        return log_partition_of(log_weights, seed=seed, replicates=replicates)

    def _pass(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, log_det = self.flow(u)
        return z, u, log_det

    def diagnostics(
        self,
        posterior: Tensor | None = None,
        *,
        n: int = 10_000,
        proposals: int = 100,
        seed: int = 0,
        methods: tuple[Method, ...] = ("prior", "flow", "sir"),
        progress: bool = False,
    ) -> PriorDiagnostics:
        """Effective sample sizes, log Z with its interval and, given draws of the aggregate posterior, the
        prior hole.

        Args:
            posterior: `[M, D]` draws of the held-out aggregate posterior (`EVaLP.posterior_sample`).
            n: samples per method.
            proposals: of SIR.
            seed: of all draws.
            methods: for which the MMD² to `posterior` is measured.
            progress: show progress bars.

        Returns:
            `PriorDiagnostics`; without `posterior`, `prior_hole` is empty and the negative log-likelihood
            (nats, of the posterior draws under p) is None.
        """
        partition = self.log_partition(seed=seed)
        draws = partial(self.draw, n, seed=seed, precision="ieee")
        sir = draws(method="sir", proposals=proposals, progress=progress)
        hole: dict[str, MMD2] = {}
        likelihood = None
        if posterior is not None:
            posterior = posterior.to(self.device)
            for method in methods:
                hole[method] = mmd2((sir if method == "sir" else draws(method=method)).samples, posterior)
            with torch.no_grad():
                likelihood = partition.value - float(self.log_prob_unnormalized(posterior).double().mean())
        ess = sir.diagnostics["ess"]
        return PriorDiagnostics(partition, float(ess.mean()), float(ess.min()), proposals, hole, likelihood)


def sampling_options(options: dict) -> SamplingOptions:
    """`SamplingOptions` from keyword arguments; an unknown one raises `TypeError` with the known names."""
    known = [f.name for f in fields(SamplingOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown sampling option {name!r}; known: {', '.join(known)}")
    return SamplingOptions(**options)


def warn_of_low_ess(ess: Tensor, proposals: int) -> None:
    """One warning when SIR's proposals are mostly wasted."""
    mean = float(ess.mean())
    if mean < _LOW_ESS * proposals:
        warnings.warn(
            f"the mean effective sample size is {mean:.1f} of {proposals} proposals: the flow is a poor "
            "proposal for this energy, and samples will repeat a few proposals",
            stacklevel=3,
        )
