"""The VAE: the shapes of every preset, its loss, and a decoder that does not depend on the batch."""

import warnings

import pytest
import torch

from evalp_fast.models.precision import Precision
from evalp_fast.models.vae import VAE, VAEConfig
from evalp_fast.training.presets import VAE_PRESETS

SMALL = VAEConfig(1, 16, 4, (4, 8), (8, 6, 4))


def small_vae() -> VAE:
    torch.manual_seed(0)
    return VAE(SMALL)


@pytest.mark.parametrize("name", sorted(VAE_PRESETS))
def test_shapes_of_the_presets(name: str) -> None:
    """Sizes and strides are the preset's; the widths are cut, for they change no shape in space."""
    shape = VAE_PRESETS[name].model
    assert shape.image_size in (32, 64)
    thin = VAEConfig(
        shape.image_channels,
        shape.image_size,
        shape.latent_dim,
        tuple(2 for _ in shape.encoder_channels),
        tuple(2 for _ in shape.decoder_channels),
        shape.kernel_size,
    )
    vae = VAE(thin).eval()
    images = torch.rand(2, shape.image_channels, shape.image_size, shape.image_size)
    mean, log_variance = vae.encode(images)
    assert mean.shape == log_variance.shape == (2, shape.latent_dim)
    decoded = vae.decode(mean)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32


def test_first_maps_of_the_published_networks() -> None:
    """CelebA: linear to 1024 x 8 x 8; CIFAR-10 and MNIST: to 1024 x 4 x 4. Meta tensors cost nothing."""
    for name, side in (("celeba64", 8), ("cifar10", 4), ("mnist-published", 4)):
        with torch.device("meta"):
            vae = VAE(VAE_PRESETS[name].model)
        assert vae.first_side == side
        assert vae.from_latent.out_features == 1024 * side * side


def test_loss_by_hand() -> None:
    """Squared error: mean over channels, sum over pixels. Guards against another reduction and a KL sign."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(3, 16, 4, (4, 8), (8, 6, 4))).eval()
    images, noise = torch.rand(5, 3, 16, 16), torch.randn(5, 4)
    loss, parts = vae.loss(images, noise, 0.3)
    mean, log_variance = vae.encode(images)
    scale = (0.5 * log_variance).exp()
    decoded = vae.decode(mean + scale * noise)
    error = (decoded - images).square().mean(dim=1).sum(dim=(1, 2)).mean()
    posterior = torch.distributions.Normal(mean, scale)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1).mean()
    torch.testing.assert_close(parts["reconstruction"], error)
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(loss, error + 0.3 * kl)
    assert not parts["kl"].requires_grad


def test_loss_reaches_every_parameter() -> None:
    vae = small_vae()
    loss, _ = vae.loss(torch.rand(6, 1, 16, 16), torch.randn(6, 4), 0.3)
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_decode_in_evaluation_mode_does_not_see_the_batch() -> None:
    vae = small_vae()
    z = torch.randn(16, 4)
    vae.train().decode(z)  # moves the running statistics, so that they differ from the batch's
    vae.eval()
    together = vae.decode(z)
    assert torch.equal(together, vae.decode(z))
    alone = torch.cat([vae.decode(row[None]) for row in z])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    assert (vae.train().decode(z) - together).abs().max() > 1e-3  # in training mode it does


@pytest.mark.parametrize("rows", [256, 257, 600])
def test_a_cpu_decodes_in_parts(rows: int) -> None:
    """In evaluation mode, 256 latents at a time, in order, with gradients; in training all at once."""
    vae = small_vae()
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    z = torch.randn(rows, 4, requires_grad=True)
    images = vae.eval().decode(z)
    assert seen == [256] * (rows // 256) + [rows % 256] * (rows % 256 > 0)
    assert images.shape == (rows, 1, 16, 16)
    torch.testing.assert_close(images[[0, -1]], vae.decode(z[[0, -1]]), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(images.sum(), z)
    assert (slope.abs().sum(1) > 0).all()
    seen.clear()
    vae.train().decode(z)
    vae.eval().decoder.train()
    vae.decode(z)
    assert seen == [rows, rows]


def test_a_size_is_not_built_in() -> None:
    """Exported and traced with more latents than are decoded at a time, the decoder takes any number."""
    vae = small_vae().eval()
    z = torch.randn(600, 4)
    rows = torch.export.Dim("rows", min=2, max=4000)
    exported = torch.export.export(Decoder(vae), (z,), dynamic_shapes=({0: rows},)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Decoder(vae), (z,))
    for count in (3, 256, 700):
        for function in (exported, traced):
            torch.testing.assert_close(
                function(z[:1].expand(count, 4)), vae.decode(z[:1]).expand(count, -1, -1, -1)
            )


class Decoder(torch.nn.Module):
    """A VAE's decoder, as what is exported wants it."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z)


@pytest.mark.parametrize("precision", [None, "ieee", "tf32", "bf16"])
def test_images_lie_in_the_unit_interval(precision: Precision | None) -> None:
    vae = small_vae().eval()
    images = vae.decode(100 * torch.randn(8, 4), precision=precision)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_bf16_decoder_is_close() -> None:
    vae = small_vae().eval()
    z = torch.randn(8, 4)
    difference = (vae.decode(z, precision="bf16") - vae.decode(z)).abs().max()
    assert 0 < difference < 0.02


def test_decode_keeps_to_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes TF32 by default: "ieee" has to switch it off, for its own convolutions alone."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    vae = small_vae().eval()
    seen = []
    vae.decoder[-1].register_forward_pre_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    for precision in ("ieee", "bf16", "tf32", None):
        vae.decode(torch.randn(2, 4), precision=precision)
    assert seen == [(False, False), (False, False), (True, True), before]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    with pytest.raises(ValueError, match="precision"):
        vae.decode(torch.randn(2, 4), precision="fp8")  # type: ignore[arg-type]


def test_decode_is_one_graph() -> None:
    vae = small_vae().eval()
    whole = torch.compile(vae.decode, backend="eager", fullgraph=True)
    z = torch.randn(2, 4)
    for precision in ("ieee", None):
        torch.testing.assert_close(whole(z, precision=precision), vae.decode(z, precision=precision))


def test_variance_is_bounded() -> None:
    """One absurd image must not end a run in infinities."""
    vae = small_vae().eval()
    with torch.no_grad():
        vae.to_posterior.weight.mul_(1e6)
    _, log_variance = vae.encode(torch.rand(8, 1, 16, 16))
    assert log_variance.min() == -20
    assert log_variance.max() == 10


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"image_channels": 0}, "image_channels"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"kernel_size": 3}, "kernel_size"),
        ({"image_size": 20}, "encoder_channels"),
        ({"image_size": 24, "decoder_channels": (8, 8, 8, 8, 8)}, "decoder_channels"),
        ({"encoder_channels": ()}, "encoder_channels"),
        ({"decoder_channels": (8,)}, "decoder_channels"),
    ],
)
def test_bad_configuration_is_named(values: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        VAEConfig(**values)


def test_bad_shape_is_named() -> None:
    vae = small_vae()
    with pytest.raises(ValueError, match=r"images must have shape \[N, 1, 16, 16\], got \(2, 3, 16, 16\)"):
        vae.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"z must have shape \[N, 4\], got \(2, 5\)"):
        vae.decode(torch.zeros(2, 5))


def test_reconstruction_is_a_mean_over_the_batch() -> None:
    vae = small_vae().eval()
    images, noise = torch.rand(4, 1, 16, 16), torch.randn(4, 4)
    together = vae.loss(images, noise, 0.3)[0]
    alone = [vae.loss(images[i : i + 1], noise[i : i + 1], 0.3)[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
