"""The convolutional VAE of EVaLP: Gaussian encoder, deterministic decoder with squared error."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalp_fast.kernels.checks import compiling
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.kernels.processor import precision_on
from evalp_fast.models.precision import Precision, check_precision

_CPU_ROWS = 256  # whose maps stay in a CPU's caches


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a `VAE`.

    Attributes:
        image_channels: 1 (grey) or 3 (RGB).
        image_size: height and width of the images.
        latent_dim: D.
        encoder_channels: widths of the encoder's convolutions; each halves the side.
        decoder_channels: width of the decoder's first map, then of its transposed convolutions; each of
            these doubles the side.
        kernel_size: of those convolutions, 4 or 5.
    """

    image_channels: int = 1
    image_size: int = 32
    latent_dim: int = 16
    encoder_channels: tuple[int, ...] = (32, 64, 128)
    decoder_channels: tuple[int, ...] = (128, 64, 32, 16)
    kernel_size: int = 4

    def __post_init__(self) -> None:
        for name in ("image_channels", "image_size", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel_size not in (4, 5):
            raise ValueError(f"kernel_size must be 4 or 5, got {self.kernel_size}")
        for name, halvings in (
            ("encoder_channels", len(self.encoder_channels)),
            ("decoder_channels", len(self.decoder_channels) - 1),
        ):
            if halvings < 1 or self.image_size % 2**halvings:
                raise ValueError(f"image_size {self.image_size} cannot be halved {halvings} times by {name}")


class VAE(nn.Module):
    """`encode` gives mean and log-variance of q(z|x); `decode` gives the image in [0, 1]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        kernel = config.kernel_size
        layers: list[nn.Module] = []
        width = config.image_channels
        for channels in config.encoder_channels:
            layers += [
                nn.Conv2d(width, channels, kernel, stride=2, padding=(kernel - 1) // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            width = channels
        side = config.image_size >> len(config.encoder_channels)
        self.encoder = nn.Sequential(*layers)
        self.to_posterior = nn.Linear(width * side * side, 2 * config.latent_dim)

        width, *channels_after = config.decoder_channels
        self.first_side = config.image_size >> len(channels_after)
        self.from_latent = nn.Linear(config.latent_dim, width * self.first_side**2)
        layers = [nn.BatchNorm2d(width), nn.ReLU()]
        for channels in channels_after:
            layers += [
                nn.ConvTranspose2d(
                    width,
                    channels,
                    kernel,
                    stride=2,
                    padding=(kernel - 1) // 2,
                    output_padding=kernel % 2,
                    bias=False,
                ),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            width = channels
        layers.append(nn.Conv2d(width, config.image_channels, 3, padding=1))
        self.decoder = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[N, C, H, W]` in [0, 1] to mean and log-variance of q(z|x), `[N, D]` each."""
        expected = (self.config.image_channels, self.config.image_size, self.config.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images must have shape [N, {', '.join(map(str, expected))}], got {tuple(images.shape)}"
            )
        h = self.encoder(images.contiguous(memory_format=torch.channels_last))
        mean, log_variance = self.to_posterior(h.flatten(1)).chunk(2, dim=1)
        # Beyond these bounds exp() is of no use to anybody, and one such image would end a run in NaN.
        return mean, log_variance.clamp(-20.0, 10.0)

    def decode(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """Latents `[N, D]` to images `[N, C, H, W]` in [0, 1], float32.

        `precision` is that of matrix products and convolutions: `"ieee"`, `"tf32"` or `"bf16"`. On a CPU
        `"tf32"` is float32, and `"bf16"` too where that is faster (`kernels/processor.py`). By default
        torch's own settings hold, by which cuDNN's float32 convolutions run in TF32; so they do where this
        function is compiled, for they are read when the convolutions run: call it within `matmul_precision`.
        """
        check_precision(precision)
        if z.ndim != 2 or z.shape[1] != self.config.latent_dim:
            raise ValueError(f"z must have shape [N, {self.config.latent_dim}], got {tuple(z.shape)}")
        # Not where a size that is compared would be built in, nor where the batch is normalised as a whole.
        traced = compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        training = getattr(self.decoder, "training", False)  # no flag where TorchScript has frozen it
        if not traced and not training and z.device.type == "cpu" and z.shape[0] > _CPU_ROWS:
            return torch.cat([self._decode(part, precision) for part in z.split(_CPU_ROWS)])
        return self._decode(z, precision)

    def _decode(self, z: Tensor, precision: Precision | None) -> Tensor:
        settled = precision is None or compiling()
        rounded = precision is not None and precision_on(z.device, precision) == "bf16"
        with (
            contextlib.nullcontext() if settled else matmul_precision(precision),
            torch.autocast(z.device.type, torch.bfloat16, enabled=rounded),
        ):
            h = self.from_latent(z).unflatten(1, (-1, self.first_side, self.first_side))
            h = self.decoder(h.contiguous(memory_format=torch.channels_last))
        return torch.sigmoid(h.float())

    def loss(self, images: Tensor, noise: Tensor, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error (mean over channels, sum over pixels) plus `kl_weight`·KL, averaged over the batch.

        `noise` `[N, D]` is the standard normal of the reparameterised posterior draw. Returns the loss and
        its parts, `reconstruction` and `kl`.
        """
        mean, log_variance = self.encode(images)
        z = mean + torch.exp(0.5 * log_variance) * noise
        error = F.mse_loss(self.decode(z), images, reduction="sum")
        reconstruction = error / (images.shape[0] * images.shape[1])
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=1).mean()
        return reconstruction + kl_weight * kl, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
