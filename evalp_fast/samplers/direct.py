"""Samplers of one pass: the Gaussian prior, and the flow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evalp_fast.kernels import philox
from evalp_fast.kernels.checks import check_positive
from evalp_fast.kernels.launch import kernels_that_give_way
from evalp_fast.samplers.base import Draws

Proposal = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Noise `u [N, D]` to `(z [N, D], log|det dz/du| [N])`: a flow's forward pass."""


@dataclass(frozen=True)
class GaussianSampler:
    """`z ~ N(0, T·I)`: the prior of a plain VAE. The noise is that of the flow's `u`, so that both sampling
    methods start from the same point."""

    dim: int
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def __call__(self, seed: int, index: Tensor) -> Draws:
        noise = philox.normal(seed, index, 0, philox.Stream.PROPOSAL, self.dim, dtype=self.dtype)
        return Draws(noise * math.sqrt(self.temperature), {})


@dataclass(frozen=True)
class FlowSampler:
    """`z = g(√T·u)`, `u ~ N(0, I)`: one pass of the flow `proposal`."""

    proposal: Proposal
    dim: int
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    tiles: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def __call__(self, seed: int, index: Tensor) -> Draws:
        noise = philox.normal(seed, index, 0, philox.Stream.PROPOSAL, self.dim, dtype=self.dtype)
        return Draws(self.proposal(noise * math.sqrt(self.temperature))[0], {})


@dataclass(frozen=True)
class FunctionSampler:
    """A function as a sampler: one that a kernel makes in a launch, say, from the noise to the result.

    Attributes:
        draw: `(seed, index)` to `Draws`.
        info: put into the `Draws`; with "composed" for its "one launch" where the GPU had no room for that.
        tiles: how many default tiles' samples it is given at once.
    """

    draw: Callable[[int, Tensor], Draws]
    info: Mapping[str, str]
    tiles: int = 1

    def __call__(self, seed: int, index: Tensor) -> Draws:
        with kernels_that_give_way() as given_way:
            draws = self.draw(seed, index)
        info = self.info
        if given_way and info.get("path") == "one launch":
            info = {**info, "path": "composed", "reason": given_way[0]}
        return draws._replace(info=info)
