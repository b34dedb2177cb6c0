"""The image RealNVP: an exact bijection with an exact density, that trains."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.models.image_flow import ImageFlowConfig, ImageRealNVP, checkerboard, squeeze, unsqueeze

SMALL = ImageFlowConfig(channels=2, height=4, width=4, hidden=8, blocks=1)
SHAPES = {
    "one scale": replace(SMALL, scales=1),
    "two scales": SMALL,
    "three scales": ImageFlowConfig(channels=1, height=8, width=16, scales=3, hidden=8, blocks=0),
    "unbounded": replace(SMALL, clamp=None),
    "latents": ImageFlowConfig(channels=20, height=8, width=8),
}


def random_flow(config: ImageFlowConfig, seed: int = 0) -> ImageRealNVP:
    """A flow that is far from the identity in every parameter."""
    torch.manual_seed(seed)
    flow = ImageRealNVP(config)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "last" in name or "norm" in name:
                parameter.normal_(std=0.1)
    return flow


def noise(config: ImageFlowConfig, n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, config.channels, config.height, config.width, generator=generator)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("training", [False, True])
def test_the_inverse_undoes_the_flow(name: str, training: bool) -> None:
    """In training mode too, where batch normalisation in a flow has no inverse."""
    config = SHAPES[name]
    flow = random_flow(config).double().train(training)
    u = noise(config, 5).double()
    z, log_det = flow(u)
    back, log_det_back = flow.inverse(z)
    assert z.shape == u.shape
    assert log_det.shape == (5,)
    assert (z - u).abs().mean() > 0.1
    torch.testing.assert_close(back, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-9)


def test_float32_round_trip() -> None:
    flow = random_flow(SHAPES["latents"])
    u = noise(flow.config, 3)
    z, log_det = flow(u)
    back, log_det_back = flow.inverse(z)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(back, u, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["one scale", "two scales", "unbounded"])
def test_log_det_is_that_of_the_jacobian(name: str) -> None:
    config = SHAPES[name]
    flow = random_flow(config).double()
    u = noise(config, 2).double()
    log_det = flow(u)[1]
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda one: flow(one)[0], u[i : i + 1])
        matrix = jacobian.reshape(u[0].numel(), u[0].numel())
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(matrix)[1])
        assert log_det[i].abs() > 0.1


def test_log_prob_is_the_change_of_variables() -> None:
    flow = random_flow(SMALL).double()
    u = noise(SMALL, 4).double()
    z, log_det = flow(u)
    log_noise = torch.distributions.Normal(0.0, 1.0).log_prob(u).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(z), log_noise - log_det)


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_new_flow_is_the_identity(name: str) -> None:
    u = noise(SHAPES[name], 3)
    z, log_det = ImageRealNVP(SHAPES[name])(u)
    assert torch.equal(z, u)
    assert torch.equal(log_det, torch.zeros(3))


@pytest.mark.parametrize(("name", "reached"), [("two scales", 0.99), ("three scales", 0.75)])
def test_outputs_depend_on_all_inputs_within_reach(name: str, reached: float) -> None:
    """A mask that never alternates, or a half that is never changed, leaves a block of the Jacobian empty."""
    config = replace(SHAPES[name], hidden=32)
    flow = random_flow(config).double()
    u = noise(config, 1).double()
    jacobian = torch.autograd.functional.jacobian(lambda one: flow(one)[0], u)
    matrix = jacobian.reshape(u.numel(), u.numel())
    assert (matrix != 0).double().mean() > reached
    off = matrix - torch.diag(matrix.diagonal())
    assert (off.abs().sum(0) > 1e-6).all()
    assert (off.abs().sum(1) > 1e-6).all()


def test_squeeze_moves_blocks_of_pixels_into_channels() -> None:
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    y = squeeze(x)
    assert y.shape == (1, 8, 2, 3)
    assert y[0, :4, 1, 2].tolist() == [x[0, 0, 2 + i, 4 + j].item() for i in (0, 1) for j in (0, 1)]
    assert torch.equal(unsqueeze(y), x)


def test_checkerboard() -> None:
    assert checkerboard(2, 3, 0).int().tolist() == [[[1, 0, 1], [0, 1, 0]]]
    assert torch.equal(checkerboard(4, 6, 1), ~checkerboard(4, 6, 0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_every_parameter_has_a_gradient(training: bool, direction: str) -> None:
    flow = random_flow(SMALL).train(training)
    x = noise(SMALL, 4).requires_grad_()
    if direction == "forward":
        z, log_det = flow(x)
        loss = z.square().mean() - log_det.mean()
    else:
        loss = -flow.log_prob(x).mean()
    loss.backward()
    assert x.grad is not None
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_against_finite_differences() -> None:
    flow = random_flow(replace(SMALL, channels=1)).double()
    z = noise(flow.config, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(flow.log_prob, (z,))


def test_initialize_standardises_the_data() -> None:
    flow = random_flow(SMALL)
    scale = torch.tensor([0.1, 30.0])[:, None, None]
    z = 5.0 + scale * noise(SMALL, 200)
    before = flow.log_prob(z).mean()
    flow.initialize(z)
    u, _ = flow.inverse(z)
    assert flow.log_prob(z).mean() > before + 100
    assert u.mean().abs() < 0.3
    assert 0.5 < u.std() < 1.5
    # They are parameters: a copy through a state dict maps alike.
    copy = ImageRealNVP(SMALL)
    copy.load_state_dict(flow.state_dict())
    assert torch.equal(copy.inverse(z)[0], u)


def test_maximum_likelihood_approaches_the_entropy_and_does_not_pass_it() -> None:
    """A wrong log-determinant is one that training can exploit: the loss then falls below the entropy."""
    torch.manual_seed(0)
    config = ImageFlowConfig(channels=2, height=4, width=4, hidden=16, blocks=1)
    size = config.channels * config.height * config.width
    mixing = torch.randn(size, size) / math.sqrt(size) + torch.eye(size)
    entropy = 0.5 * size * (1 + math.log(2 * math.pi)) + torch.linalg.slogdet(mixing)[1].item()

    def draw(n: int) -> Tensor:
        return (torch.randn(n, size) @ mixing.T).reshape(n, config.channels, config.height, config.width)

    flow = ImageRealNVP(config).train()
    held_out = draw(2000)
    untrained = -flow.log_prob(held_out).mean().item()
    flow.initialize(draw(256))
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = -flow.log_prob(draw(64)).mean()
        loss.backward()
        optimizer.step()
    trained = -flow.log_prob(held_out).mean().item()
    assert trained < untrained - 0.5 * (untrained - entropy), (untrained, trained, entropy)
    # The mean of 2,000 negative log-likelihoods has a standard error of sqrt(size / 2 / 2000) = 0.09 nats.
    assert trained > entropy - 0.4, (untrained, trained, entropy)


def test_a_sample_alone_equals_the_sample_in_a_batch() -> None:
    """Up to the rounding of convolutions, which a library may order by the batch: it has no statistics."""
    flow = random_flow(SMALL).train()
    u = noise(SMALL, 8)
    torch.testing.assert_close(flow(u[3:4])[0], flow(u)[0][3:4], rtol=1e-5, atol=1e-5)


def test_bf16_convolutions_keep_float32_densities() -> None:
    flow = random_flow(SMALL)
    u = noise(SMALL, 16)
    z, log_det = flow(u, precision="bf16")
    assert z.dtype == log_det.dtype == torch.float32
    exact = flow(u)
    assert 0 < (log_det - exact[1]).abs().max() < 0.1
    # The same rounding in both directions: the map is still inverted by its inverse.
    torch.testing.assert_close(flow.inverse(z, precision="bf16")[0], u, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", [None, "ieee", "bf16"])
def test_autocast_changes_nothing(precision: Any) -> None:
    """The precision is an argument. Autocast's convolutions would be bfloat16 that no coupling takes."""
    flow = ImageRealNVP(ImageFlowConfig(channels=2, height=4, width=4, hidden=8, blocks=1)).eval()
    z = torch.randn(3, 2, 4, 4)
    expected = flow.log_prob(z, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.log_prob(z, precision=precision), expected)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    flow = random_flow(
        replace(SMALL, checkerboard_couplings=1, channel_couplings=1, last_couplings=1, blocks=0)
    )
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    u = noise(SMALL, 3)
    for one, other in zip(compiled(u), flow(u), strict=True):
        torch.testing.assert_close(one, other)


def test_empty_batch() -> None:
    z, log_det = random_flow(SMALL)(noise(SMALL, 0))
    assert z.shape == (0, 2, 4, 4)
    assert log_det.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels must be at least 1"),
        ({"scales": 0}, "scales must be at least 1"),
        ({"height": 6, "scales": 3}, "height must be a multiple of 4"),
        ({"width": 2}, "width must be a multiple of 2, at least 4"),
        ({"blocks": -1}, "blocks must not be negative"),
        ({"clamp": 0.0}, "clamp must be positive or None"),
    ],
)
def test_wrong_configurations_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFlowConfig(**{**asdict(SMALL), **change})


def test_wrong_arguments_are_named() -> None:
    flow = ImageRealNVP(SMALL)
    with pytest.raises(ValueError, match=r"u must have shape \[N, 2, 4, 4\], got \(3, 2, 4, 5\)"):
        flow(torch.zeros(3, 2, 4, 5))
    with pytest.raises(ValueError, match=r"z must have shape \[N, 2, 4, 4\], got \(3, 32\)"):
        flow.log_prob(torch.zeros(3, 32))
    with pytest.raises(ValueError, match="precision must be one of"):
        flow(torch.zeros(3, 2, 4, 4), precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="z must have at least 2 samples"):
        flow.initialize(torch.zeros(1, 2, 4, 4))
