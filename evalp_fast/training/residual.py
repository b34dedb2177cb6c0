"""Stage two, the better recipe: the flow by maximum likelihood, then the energy as a residual on it.

1. The flow g maximises the likelihood of draws of the aggregate posterior: the forward KL, which covers every
   mode and is free because g has an exact density.
2. The flow is frozen and p(z) ∝ g(z)·exp(-r(z)) is fitted by noise-contrastive estimation with g as the noise
   (Gutmann & Hyvärinen 2010; Aneja et al. 2021, eq. 6): the classifier with logit -r(z) that tells posterior
   draws from flow draws has -r = log q/g + const at its optimum.

Both nets are used as their exponential moving averages.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evalp_fast.data import DataOrder
from evalp_fast.kernels import philox
from evalp_fast.kernels.mlp_device import Activation
from evalp_fast.models.energy import EnergyConfig
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.pipeline import EVaLP
from evalp_fast.priors import PriorConfig
from evalp_fast.training.latents import (
    Latents,
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


@dataclass(frozen=True)
class ResidualTraining:
    """How flow and residual energy are trained.

    Attributes:
        couplings: of the flow.
        flow_hidden: width of the flow's hidden layers.
        flow_activation: of the flow's hidden layers.
        clamp: bound of the flow's log-scales.
        flow_epochs: passes over the posteriors for the flow's maximum likelihood.
        flow_batch_size: posterior draws per step.
        flow_learning_rate: of Adam, with a cosine to zero.
        energy_hidden: width of the energy's hidden layers (SiLU; the last layer starts at zero).
        energy_depth: number of the energy's hidden layers.
        energy_epochs: passes over the posteriors for the energy's noise contrast; 0 leaves the flow alone.
        energy_batch_size: posterior draws per step, and as many flow draws.
        energy_learning_rate: of AdamW, with a cosine to zero.
        energy_weight_decay: of AdamW.
        moving_average: decay of the averages.
        evaluate_every: epochs between evaluations.
        seed: of the initial weights, the data order and all draws.
    """

    couplings: int = 12
    flow_hidden: int = 192
    flow_activation: Activation = "relu"
    clamp: float = 2.0
    flow_epochs: int = 90
    flow_batch_size: int = 512
    flow_learning_rate: float = 1e-3
    energy_hidden: int = 256
    energy_depth: int = 3
    energy_epochs: int = 50
    energy_batch_size: int = 512
    energy_learning_rate: float = 1e-3
    energy_weight_decay: float = 0.05
    moving_average: float = 0.999
    evaluate_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("flow_epochs", "flow_batch_size", "energy_batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.energy_epochs < 0:
            raise ValueError(f"energy_epochs must be at least 0, got {self.energy_epochs}")


def contrast_loss(energy_of_data: Tensor, energy_of_noise: Tensor) -> Tensor:
    """Binary cross-entropy of the classifier with logit -r: data against noise, in equal numbers."""
    return 0.5 * (F.softplus(energy_of_data).mean() + F.softplus(-energy_of_noise).mean())


@torch.no_grad()
def flow_draws(flow: CouplingFlow, count: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """`count` fresh draws of the flow for one training step."""
    index = torch.arange(step * count, (step + 1) * count, device=device)
    return flow(philox.normal(seed, index, 1, philox.Stream.PROPOSAL, flow.config.dim))[0]


def train_residual_prior(
    config: ResidualTraining,
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

    While the flow is trained, the best is the one whose samples have the lowest MMD² to the validation
    posterior; the likelihood of validation latents, logged beside it, turns earlier, where samples still
    gain. Then it is the energy on that last flow that gives validation latents the highest likelihood.

    Raises:
        FileError, DataError: the VAE or the images are missing or broken.
        RunExistsError: `out` holds a run and `resume` is False, or holds another run.
        DivergenceError: a loss is no longer finite; what was saved before is kept.
    """
    run = Run(
        out,
        method="residual",
        config=config,
        resume=resume,
        inputs={"vae": str(vae), "data": data, "limit": limit, "skip_broken": skip_broken},
    )
    latents = encode(vae, data, device=device, limit=limit, skip_broken=skip_broken, progress=progress)
    monitor = PriorMonitor(latents.validation, config.seed)
    dim = latents.train.mean.shape[1]

    shape = PriorConfig(
        FlowConfig(
            dim,
            config.couplings,
            config.flow_hidden,
            activation=config.flow_activation,
            clamp=config.clamp,
        ),
        EnergyConfig(dim, config.energy_hidden, config.energy_depth, "silu", zero_init=True),
        base="flow",
    )
    model, averaged = models_with_new_prior(latents, shape, seed=config.seed, device=device)
    prior, averaged_prior = model.prior, averaged.prior
    assert prior is not None
    assert averaged_prior is not None
    flow, energy = prior.flow, prior.energy_net

    parts = {
        "flow": flow,
        "energy": energy,
        "flow_average": MovingAverage(flow, config.moving_average),
        "energy_average": MovingAverage(energy, config.moving_average),
        "flow_optimizer": torch.optim.Adam(flow.parameters(), fused=True),
        "energy_optimizer": torch.optim.AdamW(
            energy.parameters(), weight_decay=config.energy_weight_decay, fused=True
        ),
    }
    saved = run.load(parts)
    step = saved.get("step", 0)

    flow_order = DataOrder(len(latents.train.mean), config.flow_batch_size, config.seed)
    energy_order = DataOrder(len(latents.train.mean), config.energy_batch_size, config.seed + 1)
    flow_steps = config.flow_epochs * flow_order.steps_per_epoch
    energy_steps = config.energy_epochs * energy_order.steps_per_epoch
    best: list[float] = saved.get("best", [2, 0.0])  # any energy is better than none

    def evaluate(losses: dict[str, float]) -> None:
        nonlocal best
        parts["flow_average"].copy_to(averaged_prior.flow)
        parts["energy_average"].copy_to(averaged_prior.energy_net)
        run.require_finite(step, **losses, parameters=parameter_norm(flow, energy))
        measured = monitor.measure(averaged)
        run.require_finite(step, nll_prior=measured["nll_prior"])
        run.log(step, {**losses, **measured})
        averaged.info = _info(config, run, latents, step, measured)
        averaged.save_pretrained(run.directory / "last")
        with_energy = step > flow_steps
        score = [0, measured["nll_prior"]] if with_energy else [1, measured["mmd2_flow"]]
        if score < best:
            best = score
            averaged.save_pretrained(run.directory / "best")
        save_method_grids(averaged, run, step)
        run.save(step, {**parts, "best": best})

    loss = torch.zeros(())
    with tqdm(
        total=flow_steps, initial=min(step, flow_steps), desc="flow", disable=not progress, leave=False
    ) as bar:
        while step < flow_steps:
            factor = cosine_schedule(step, flow_steps, warmup=100)
            set_learning_rate(parts["flow_optimizer"], config.flow_learning_rate * factor)
            z = latents.train.draw(flow_order.batch(step).to(device), seed=config.seed, step=step)
            loss = -flow.log_prob(z).mean()
            parts["flow_optimizer"].zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            parts["flow_optimizer"].step()
            parts["flow_average"].update(flow)
            step += 1
            bar.update()
            if step % (config.evaluate_every * flow_order.steps_per_epoch) == 0 or step == flow_steps:
                evaluate({"flow_loss": float(loss.detach())})

    # The noise is the averaged flow: the one that the finished prior is a residual on.
    parts["flow_average"].copy_to(averaged_prior.flow)
    with tqdm(
        total=energy_steps, initial=step - flow_steps, desc="energy", disable=not progress, leave=False
    ) as bar:
        while step < flow_steps + energy_steps:
            at = step - flow_steps
            factor = cosine_schedule(at, energy_steps, warmup=100)
            set_learning_rate(parts["energy_optimizer"], config.energy_learning_rate * factor)
            data_latents = latents.train.draw(energy_order.batch(at).to(device), seed=config.seed, step=step)
            noise_latents = flow_draws(
                averaged_prior.flow,
                config.energy_batch_size,
                seed=config.seed,
                step=at,
                device=averaged.device,
            )
            loss = contrast_loss(energy(data_latents), energy(noise_latents))
            parts["energy_optimizer"].zero_grad(set_to_none=True)
            loss.backward()
            parts["energy_optimizer"].step()
            parts["energy_average"].update(energy)
            step += 1
            bar.update()
            if (at + 1) % (
                config.evaluate_every * energy_order.steps_per_epoch
            ) == 0 or at + 1 == energy_steps:
                evaluate({"energy_loss": float(loss.detach())})
    run.close()
    return EVaLP.from_pretrained(run.directory, device=device)


def _info(
    config: ResidualTraining, run: Run, latents: Latents, step: int, measured: dict[str, float]
) -> dict:
    stage = prior_stage(
        "prior (flow by maximum likelihood, energy as a residual on it by noise contrast)",
        latents,
        seed=config.seed,
        step=step,
        minutes=run.seconds / 60,
        validation=measured,
    )
    stages = latents.vae.info.get("training", [])[:1]
    return {"name": f"EVaLP on {latents.name}", "training": [*stages, stage]}
