"""Stage two, as published: energy and flow in an alternating game (Dutta et al. 2025, arXiv:2510.00260).

With `log Z = max_g { E_g[-f/w] - KL(g ‖ N) }` maximum likelihood of p(z) ∝ N(z; 0, I)·exp(-f(z)/w) becomes

- energy step: minimise `E_q[f] - E_g[f] + λ·E[(‖∇f(ẑ)‖ - 1)²]`, ẑ on the segment between a posterior draw
  and a flow draw;
- sampler step: minimise `E_g[f] + w·KL(g ‖ N)`, which is `w·KL(g ‖ p)` up to a constant: the prior that the
  flow is fitted to has energy f/w, so w is an inverse temperature and belongs to the model.

The flow can be trained by the forward KL instead, or by both: it has an exact density, so the likelihood of
posterior draws is available for free, and unlike the reverse KL it loses no mode.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from evalp_fast.data import DataOrder
from evalp_fast.kernels import philox
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig, standard_normal_log_prob
from evalp_fast.pipeline import EVaLP
from evalp_fast.priors import PriorConfig
from evalp_fast.training.latents import (
    PriorMonitor,
    encode,
    models_with_new_prior,
    prior_stage,
    save_method_grids,
)
from evalp_fast.training.run import (
    MovingAverage,
    Run,
    cosine_schedule,
    parameter_norm,
    set_learning_rate,
)

SamplerObjective = Literal["reverse_kl", "forward_kl", "both"]


@dataclass(frozen=True)
class EVaLPTraining:
    """How energy and flow are trained against each other.

    Attributes:
        couplings: of the flow.
        flow_hidden: width of the flow's hidden layers (ReLU).
        mixing: of columns between couplings: `shuffle`, or `swap` as published.
        clamp: bound of the flow's log-scales.
        energy_hidden: width of the energy's hidden layers (LeakyReLU).
        energy_depth: number of the energy's hidden layers.
        kl_weight: w, in (0, 1].
        gradient_penalty: λ.
        sampler_objective: `reverse_kl` (published), `forward_kl` (likelihood of posterior draws), or `both`,
            the two KLs with the same weight.
        energy_steps: energy steps per sampler step.
        epochs: passes over the posteriors.
        batch_size: posterior draws per energy step.
        optimizer: `adam` (betas 0.5, 0.999) or `rmsprop`, for both nets.
        energy_learning_rate: of the energy.
        flow_learning_rate: of the flow.
        schedule: `cosine` to zero, or `constant`.
        moving_average: decay of the flow's exponential moving average; 0 keeps the last iterate.
        evaluate_every: epochs between evaluations.
        seed: of the initial weights, the data order and all draws.
    """

    couplings: int = 8
    flow_hidden: int = 128
    mixing: Literal["shuffle", "swap"] = "shuffle"
    clamp: float = 2.0
    energy_hidden: int = 128
    energy_depth: int = 2
    kl_weight: float = 0.1
    gradient_penalty: float = 10.0
    sampler_objective: SamplerObjective = "reverse_kl"
    energy_steps: int = 1
    epochs: int = 30
    batch_size: int = 256
    optimizer: Literal["adam", "rmsprop"] = "adam"
    energy_learning_rate: float = 5e-4
    flow_learning_rate: float = 5e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    moving_average: float = 0.999
    evaluate_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("energy_steps", "epochs", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.kl_weight <= 1.0:
            raise ValueError(f"kl_weight must be in (0, 1], got {self.kl_weight}")


def energy_loss(
    energy: MLPEnergy, data: Tensor, samples: Tensor, place: Tensor, gradient_penalty: float
) -> Tensor:
    """`E_q[f] - E_g[f]` with the gradient penalty at `place·data + (1 - place)·samples`, `place` `[N, 1]`."""
    between = torch.lerp(samples, data, place)
    _, gradient = energy.gradient(between)
    penalty = (gradient.norm(dim=1) - 1.0).square().mean()
    return energy(data).mean() - energy(samples).mean() + gradient_penalty * penalty


def sampler_loss(
    flow: CouplingFlow,
    energy: MLPEnergy,
    noise: Tensor,
    data: Tensor,
    kl_weight: float,
    objective: SamplerObjective,
) -> Tensor:
    """The flow's loss for one batch of noise u ~ N(0, I) and of posterior draws."""
    loss = noise.new_zeros(())
    if objective != "forward_kl":
        z, log_det = flow(noise)
        log_g = standard_normal_log_prob(noise) - log_det
        kl = (log_g - standard_normal_log_prob(z)).mean()
        loss = loss + energy(z).mean() + kl_weight * kl
    if objective != "reverse_kl":
        # Beside the reverse KL, both have the same weight; alone, its scale would only meet Adam's epsilon.
        weight = kl_weight if objective == "both" else 1.0
        loss = loss - weight * flow.log_prob(data).mean()
    return loss


def _optimizer(kind: str, parameters, learning_rate: float) -> torch.optim.Optimizer:
    if kind == "rmsprop":
        return torch.optim.RMSprop(parameters, learning_rate)
    return torch.optim.Adam(parameters, learning_rate, betas=(0.5, 0.999), fused=True)


def train_evalp_prior(
    config: EVaLPTraining,
    vae: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    limit: int | None = None,
    skip_broken: bool = False,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> EVaLP:
    """Train the prior of `vae` and leave a run in `out`; returns the best model on validation latents.

    The best is the one whose flow samples have the lowest MMD² to the validation posterior.

    Raises:
        FileError, DataError: the VAE or the images are missing or broken.
        RunExistsError: `out` holds a run and `resume` is False, or holds another run.
        DivergenceError: a loss is no longer finite; what was saved before is kept.
    """
    run = Run(
        out,
        method="evalp",
        config=config,
        resume=resume,
        inputs={"vae": str(vae), "data": data, "limit": limit, "skip_broken": skip_broken},
    )
    latents = encode(vae, data, device=device, limit=limit, skip_broken=skip_broken, progress=progress)
    monitor = PriorMonitor(latents.validation, config.seed)
    dim = latents.train.mean.shape[1]

    shape = PriorConfig(
        FlowConfig(dim, config.couplings, config.flow_hidden, clamp=config.clamp, mixing=config.mixing),
        EnergyConfig(dim, config.energy_hidden, config.energy_depth, "leaky_relu"),
        base="gaussian",
        kl_weight=config.kl_weight,
    )
    model, averaged = models_with_new_prior(latents, shape, seed=config.seed, device=device)
    prior, averaged_prior = model.prior, averaged.prior
    assert prior is not None
    assert averaged_prior is not None
    flow, energy = prior.flow, prior.energy_net
    flow_average = MovingAverage(flow, config.moving_average)
    flow_optimizer = _optimizer(config.optimizer, flow.parameters(), config.flow_learning_rate)
    energy_optimizer = _optimizer(config.optimizer, energy.parameters(), config.energy_learning_rate)
    parts = {
        "flow": flow,
        "energy": energy,
        "flow_average": flow_average,
        "flow_optimizer": flow_optimizer,
        "energy_optimizer": energy_optimizer,
    }
    saved = run.load(parts)
    step, best = saved.get("step", 0), saved.get("best", float("inf"))
    order = DataOrder(len(latents.train.mean), config.batch_size, config.seed)
    total = config.epochs * order.steps_per_epoch
    between_evaluations = config.evaluate_every * order.steps_per_epoch

    with tqdm(total=total, initial=step, desc="energy and flow", disable=not progress, leave=False) as bar:
        while step < total:
            if config.schedule == "cosine":
                factor = cosine_schedule(step, total, warmup=100)
                set_learning_rate(flow_optimizer, config.flow_learning_rate * factor)
                set_learning_rate(energy_optimizer, config.energy_learning_rate * factor)
            data_latents = latents.train.draw(order.batch(step).to(device), seed=config.seed, step=step)
            index = torch.arange(config.batch_size, device=device)
            noise = philox.normal(config.seed, index, step, philox.Stream.INITIAL, dim)
            place = philox.uniform(config.seed, index, step, philox.Stream.INTERPOLATION, 1)

            with torch.no_grad():
                samples, _ = flow(noise)
            loss = energy_loss(energy, data_latents, samples, place, config.gradient_penalty)
            energy_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            energy_optimizer.step()
            losses = {"energy_loss": float(loss.detach())}

            if (step + 1) % config.energy_steps == 0:
                loss = sampler_loss(
                    flow, energy, noise, data_latents, config.kl_weight, config.sampler_objective
                )
                flow_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                flow_optimizer.step()
                flow_average.update(flow)
                losses["sampler_loss"] = float(loss.detach())

            step += 1
            bar.update()
            if step % between_evaluations and step != total:
                continue
            run.require_finite(step, **losses, parameters=parameter_norm(flow, energy))
            flow_average.copy_to(averaged_prior.flow)
            averaged_prior.energy_net.load_state_dict(energy.state_dict())
            measured = monitor.measure(averaged)
            run.log(step, {**losses, **measured})
            averaged.info = {
                "name": f"EVaLP on {latents.name}",
                "training": [
                    *latents.vae.info.get("training", [])[:1],
                    prior_stage(
                        f"prior (EVaLP's alternating game, {config.sampler_objective})",
                        latents,
                        seed=config.seed,
                        step=step,
                        minutes=run.seconds / 60,
                        validation=measured,
                    ),
                ],
            }
            averaged.save_pretrained(run.directory / "last")
            if measured["mmd2_flow"] < best:
                best = measured["mmd2_flow"]
                averaged.save_pretrained(run.directory / "best")
            save_method_grids(averaged, run, step)
            run.save(step, {**parts, "best": best})
    run.close()
    return EVaLP.from_pretrained(run.directory, device=device)
