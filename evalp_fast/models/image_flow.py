"""The sampler of a prior over feature maps: the image RealNVP of Dinh, Sohl-Dickstein, Bengio (ICLR 2017).

Checkerboard couplings, a squeeze of 2x2 pixels into channels, channel couplings, and half of the channels
factored out as noise (their sections 3.4 to 3.6); the other half goes on to the next, coarser scale.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.mlp_reference import without_autocast
from evalp_fast.kernels.processor import precision_on
from evalp_fast.models.flow import standard_normal_log_prob
from evalp_fast.models.precision import Precision, check_precision


@dataclass(frozen=True)
class ImageFlowConfig:
    """Shape of an `ImageRealNVP`. The defaults are those of a hierarchical VAE's top group of latents.

    Attributes:
        channels: channels C of the latents, e.g. 20.
        height: H, a multiple of 2^(scales-1), and at least 2 pixels on the last scale.
        width: W, likewise.
        scales: number of scales; 1 has checkerboard couplings only.
        hidden: channels of the conditioners' hidden layers.
        blocks: residual blocks of every conditioner, at least 0.
        checkerboard_couplings: before each squeeze.
        channel_couplings: after each squeeze.
        last_couplings: checkerboard couplings of the last scale.
        clamp: bound c of the log-scales, by `c·tanh(s/c)`; None leaves them unbounded.
    """

    channels: int
    height: int
    width: int
    scales: int = 2
    hidden: int = 40
    blocks: int = 2
    checkerboard_couplings: int = 3
    channel_couplings: int = 3
    last_couplings: int = 4
    clamp: float | None = 2.0

    def __post_init__(self) -> None:
        for name in ("channels", "scales", "hidden", "last_couplings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("blocks", "checkerboard_couplings", "channel_couplings"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        factor = 2 ** (self.scales - 1)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % factor or size < 2 * factor:
                need = f"a multiple of {factor}, at least {2 * factor}, for {self.scales} scales"
                raise ValueError(f"{name} must be {need}, got {size}")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive or None, got {self.clamp}")


def squeeze(x: Tensor) -> Tensor:
    """`[N, C, H, W]` to `[N, 4C, H/2, W/2]`: each channel becomes the four pixels of its 2x2 blocks."""
    # Not pixel_unshuffle, which loses the shape of an empty batch.
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 2, 2, w // 2, 2)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of `squeeze`: `[N, 4C, H, W]` to `[N, C, 2H, 2W]`."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c // 4, 2, 2, h, w)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def checkerboard(height: int, width: int, parity: int) -> Tensor:
    """bool `[1, H, W]`, True where row + column has this parity."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    return ((rows + columns) % 2 == parity)[None]


class _Convolution(nn.Conv2d):
    """A convolution whose operands are rounded to bfloat16 where `precision` says so, and not by autocast."""

    def forward(self, input: Tensor, precision: Precision | None = None) -> Tensor:
        with without_autocast(input.device):
            if precision is None or precision_on(input.device, precision) != "bf16":
                return super().forward(input)
            product = F.conv2d(input.bfloat16(), self.weight.bfloat16(), padding=self.padding).to(input.dtype)
            return product if self.bias is None else product + self.bias[:, None, None]


class _Conditioner(nn.Module):
    """A residual network from `[N, C, H, W]` to log-scales and shifts `[N, out, H, W]`; zero at the start."""

    def __init__(self, channels: int, out: int, hidden: int, blocks: int):
        super().__init__()
        self.first = _Convolution(channels, hidden, 3, padding=1)
        self.residual = nn.ModuleList(_Convolution(hidden, hidden, 3, padding=1) for _ in range(2 * blocks))
        self.last = _Convolution(hidden, 2 * out, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, precision: Precision | None) -> tuple[Tensor, Tensor]:
        h = self.first(x, precision)
        for first, second in zip(self.residual[::2], self.residual[1::2], strict=True):
            h = h + second(F.relu(first(F.relu(h), precision)), precision)
        log_scale, shift = self.last(F.relu(h), precision).chunk(2, dim=1)
        return log_scale, shift


class _ActNorm(nn.Module):
    """x·exp(s) + t with one s and t a channel (Kingma, Dhariwal 2018), the identity until `fit`.

    It stands where the paper has batch normalisation, and unlike it treats every sample alone, in both
    directions and both modes.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def fit(self, x: Tensor) -> None:
        """Let the inverse map of `x` have mean 0 and variance 1 in each channel."""
        deviation, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        self.log_scale.copy_(deviation[0].clamp(min=1e-4).log())
        self.shift.copy_(mean[0])

    def forward(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        log_det = self.log_scale.sum() * (x.shape[2] * x.shape[3])
        if inverse:
            return (x - self.shift) * torch.exp(-self.log_scale), -log_det
        return x * torch.exp(self.log_scale) + self.shift, log_det


class _CheckerboardCoupling(nn.Module):
    """Changes the pixels of one colour, given those of the other."""

    mask: Tensor

    def __init__(self, channels: int, height: int, width: int, config: ImageFlowConfig, parity: int):
        super().__init__()
        self.clamp = config.clamp
        self.conditioner = _Conditioner(channels, channels, config.hidden, config.blocks)
        self.register_buffer("mask", checkerboard(height, width, parity), persistent=False)

    def forward(self, x: Tensor, inverse: bool, precision: Precision | None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.conditioner(x.masked_fill(self.mask, 0.0), precision)
        return affine_coupling(x, log_scale, shift, inverse=inverse, clamp=self.clamp, mask=self.mask)


class _ChannelCoupling(nn.Module):
    """Changes one half of the channels, given the other."""

    def __init__(self, channels: int, config: ImageFlowConfig, parity: int):
        super().__init__()
        self.clamp, self.parity = config.clamp, parity
        self.conditioner = _Conditioner(channels // 2, channels // 2, config.hidden, config.blocks)

    def forward(self, x: Tensor, inverse: bool, precision: Precision | None) -> tuple[Tensor, Tensor]:
        halves = list(x.chunk(2, dim=1))
        log_scale, shift = self.conditioner(halves[1 - self.parity], precision)
        halves[self.parity], log_det = affine_coupling(
            halves[self.parity], log_scale, shift, inverse=inverse, clamp=self.clamp
        )
        return torch.cat(halves, dim=1), log_det


class _Layer(nn.Module):
    """A coupling and, on its side of the data, an `_ActNorm`."""

    def __init__(self, channels: int, coupling: nn.Module):
        super().__init__()
        self.norm = _ActNorm(channels)
        self.coupling = coupling

    def forward(
        self, x: Tensor, inverse: bool, precision: Precision | None, fit: bool
    ) -> tuple[Tensor, Tensor]:
        if inverse:
            if fit:
                self.norm.fit(x)
            x, outer = self.norm(x, inverse)
            x, inner = self.coupling(x, inverse, precision)
        else:
            x, inner = self.coupling(x, inverse, precision)
            x, outer = self.norm(x, inverse)
        return x, inner + outer


class ImageRealNVP(nn.Module):
    """An invertible map g from noise u ~ N(0, I) to feature maps z, with exact log-determinants.

    u and z have the shape `[N, C, H, W]`; what is factored out keeps its place in u. The conditioners' last
    layers start at zero, so that a new flow is the identity and its density N(0, I). Nothing depends on the
    rest of the batch, nor on `train()` or `eval()`.
    """

    def __init__(self, config: ImageFlowConfig):
        super().__init__()
        self.config = config
        self.checkerboards, self.channels = nn.ModuleList(), nn.ModuleList()
        channels, height, width = config.channels, config.height, config.width
        for scale in range(config.scales):
            last = scale == config.scales - 1
            count = config.last_couplings if last else config.checkerboard_couplings
            self.checkerboards.append(
                nn.ModuleList(
                    _Layer(channels, _CheckerboardCoupling(channels, height, width, config, i % 2))
                    for i in range(count)
                )
            )
            if not last:
                self.channels.append(
                    nn.ModuleList(
                        _Layer(4 * channels, _ChannelCoupling(4 * channels, config, i % 2))
                        for i in range(config.channel_couplings)
                    )
                )
            channels, height, width = 2 * channels, height // 2, width // 2

    def _check(self, x: Tensor, name: str) -> None:
        c, h, w = self.config.channels, self.config.height, self.config.width
        if x.ndim != 4 or tuple(x.shape[1:]) != (c, h, w):
            raise ValueError(f"{name} must have shape [N, {c}, {h}, {w}], got {tuple(x.shape)}")

    def _decode(self, u: Tensor, scale: int, precision: Precision | None) -> tuple[Tensor, Tensor]:
        """From the noise of this scale and all coarser ones to what comes out of this scale."""
        log_det = u.new_zeros(u.shape[0])
        if scale < len(self.channels):
            factored, kept = squeeze(u).chunk(2, dim=1)
            kept, log_det = self._decode(kept, scale + 1, precision)
            u = torch.cat((factored, kept), dim=1)
            for layer in self.channels[scale]:  # type: ignore[attr-defined]
                u, part = layer(u, False, precision, False)
                log_det = log_det + part
            u = unsqueeze(u)
        for layer in self.checkerboards[scale]:  # type: ignore[attr-defined]
            u, part = layer(u, False, precision, False)
            log_det = log_det + part
        return u, log_det

    def _encode(self, z: Tensor, scale: int, precision: Precision | None, fit: bool) -> tuple[Tensor, Tensor]:
        """The inverse of `_decode`."""
        log_det = z.new_zeros(z.shape[0])
        for layer in reversed(self.checkerboards[scale]):  # type: ignore[call-overload]
            z, part = layer(z, True, precision, fit)
            log_det = log_det + part
        if scale < len(self.channels):
            z = squeeze(z)
            for layer in reversed(self.channels[scale]):  # type: ignore[call-overload]
                z, part = layer(z, True, precision, fit)
                log_det = log_det + part
            factored, kept = z.chunk(2, dim=1)
            kept, part = self._encode(kept, scale + 1, precision, fit)
            z, log_det = unsqueeze(torch.cat((factored, kept), dim=1)), log_det + part
        return z, log_det

    def forward(self, u: Tensor, *, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """Noise to latents: `(z [N, C, H, W], log|det dz/du| [N])`. `precision` is that of the convolutions.

        Raises:
            ValueError: u has another shape, or precision is unknown.
        """
        self._check(u, "u")
        check_precision(precision)
        return self._decode(u, 0, precision)

    def inverse(self, z: Tensor, *, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """Latents to noise: `(u [N, C, H, W], log|det du/dz| [N])`. Raises as `forward`."""
        self._check(z, "z")
        check_precision(precision)
        return self._encode(z, 0, precision, fit=False)

    def log_prob(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """log g(z) of the samples `z` `[N, C, H, W]`: `[N]`. Raises as `forward`."""
        u, log_det = self.inverse(z, precision=precision)
        return standard_normal_log_prob(u.flatten(1)) + log_det

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """Set the scale and shift of every channel so that `z` `[N, C, H, W]` becomes standard in each.

        Once, before training: the data-dependent initialisation of Kingma and Dhariwal (2018), section 3.1.
        What it computes are parameters, so a checkpoint holds them.

        Raises:
            ValueError: z has another shape, or fewer than two samples.
        """
        self._check(z, "z")
        if z.shape[0] < 2:
            raise ValueError(f"z must have at least 2 samples to be standardised, got {z.shape[0]}")
        self._encode(z, 0, None, fit=True)


__all__ = ["ImageFlowConfig", "ImageRealNVP", "checkerboard", "squeeze", "unsqueeze"]
