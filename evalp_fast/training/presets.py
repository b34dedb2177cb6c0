"""Named configurations: the recipes that were measured, and the settings of the published code."""

from evalp_fast.models.vae import VAEConfig
from evalp_fast.training.evalp import EVaLPTraining
from evalp_fast.training.residual import ResidualTraining
from evalp_fast.training.vae import VAETraining

_PUBLISHED_ENCODER = (128, 256, 512, 1024)
_PUBLISHED_DECODER = (1024, 512, 256, 128)

VAE_PRESETS: dict[str, VAETraining] = {
    # The model that ships: small enough for two CPU cores. The KL weight is a third of the published one:
    # reconstructions gain, and the wider gap between prior and aggregate posterior is stage two's to close.
    "mnist": VAETraining(),
    # A tenth of the published KL weight, which opens a hole between prior and aggregate posterior.
    "mnist-hole": VAETraining(kl_weight=0.0312),
    # The published settings (code of Dutta et al. 2025).
    "mnist-published": VAETraining(
        model=VAEConfig(1, 32, 16, _PUBLISHED_ENCODER, _PUBLISHED_DECODER, 4),
        kl_weight=0.312,
        epochs=150,
        batch_size=64,
        learning_rate=1e-4,
        schedule="constant",
    ),
    "cifar10": VAETraining(
        data="cifar10",
        model=VAEConfig(3, 32, 128, _PUBLISHED_ENCODER, _PUBLISHED_DECODER, 4),
        kl_weight=0.006,
        epochs=100,
        batch_size=100,
        learning_rate=1e-3,
        schedule="constant",
    ),
    "celeba64": VAETraining(
        data="celeba64",
        model=VAEConfig(3, 64, 64, _PUBLISHED_ENCODER, _PUBLISHED_DECODER, 5),
        kl_weight=0.05024,
        epochs=70,
        batch_size=100,
        learning_rate=1e-3,
        schedule="constant",
    ),
}

_CIFAR10_PUBLISHED = EVaLPTraining(
    couplings=4,
    flow_hidden=512,
    mixing="swap",
    energy_hidden=200,
    kl_weight=1e-8,
    energy_steps=5,
    epochs=100,
    batch_size=100,
    schedule="constant",
    moving_average=0.0,
)

PRIOR_PRESETS: dict[str, ResidualTraining | EVaLPTraining] = {
    # The better recipe: flow by maximum likelihood, energy as a residual on it.
    "mnist": ResidualTraining(),
    "cifar10": ResidualTraining(flow_hidden=512, energy_hidden=512),
    "celeba64": ResidualTraining(flow_hidden=256, energy_hidden=512),
    # EVaLP as published (reverse KL, gradient penalty), with settings that work.
    "mnist-evalp": EVaLPTraining(),
    # The published settings. On MNIST the flow loses modes and the weights, with f/1e-8, have an ESS of 1.
    "mnist-published": EVaLPTraining(
        couplings=2,
        flow_hidden=128,
        mixing="swap",
        energy_hidden=128,
        kl_weight=1e-8,
        energy_steps=5,
        epochs=100,
        batch_size=64,
        schedule="constant",
        moving_average=0.0,
    ),
    "cifar10-published": _CIFAR10_PUBLISHED,
    "celeba64-published": EVaLPTraining(
        couplings=4,
        flow_hidden=256,
        mixing="swap",
        energy_hidden=200,
        kl_weight=1e-3,
        energy_steps=1,
        epochs=70,
        batch_size=100,
        optimizer="rmsprop",
        energy_learning_rate=5e-5,
        flow_learning_rate=5e-5,
        schedule="constant",
        moving_average=0.0,
    ),
}
