"""States of Langevin chains for the tests of their steps: random, of any shapes, with numbers far apart."""

import math

import torch
from torch import Tensor

SEED, STEP = (5 << 40) + 3, 11

ACCEPTANCE_SHAPES = [
    [(8,)],
    [(3, 4, 4)],
    [(7,)],
    [()],
    [(0,), (4,)],
    [(0,)],
    [(8,), (4, 4), (12,)],
    [(3,), (5,), (2, 2), (1,)],
    [(2500,), (3,)],  # a row in several blocks
]

STEP_SHAPES = [
    [(8,)],
    [(3, 4, 4)],  # 48 columns in one tensor
    [(1100,)],  # several programs, with groups of more than one row each
    [(7,)],  # not a multiple of four
    [(2,)],
    [()],
    [(0,), (4,)],
    [(8,), (4, 4), (12,)],  # a list in which every tensor starts a Philox block
    [(3,), (5,), (2, 2), (1,)],  # and one in which none but the first does
    [(4,)] * 8,
]


def numbers(count: int) -> Tensor:
    """Sample numbers that are far apart and pass 2^32, so that both parts of an index are used."""
    return torch.arange(count) * 7919 + (3 << 33)


def tensors_of(value: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """A state as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def assert_same(actual, expected) -> None:
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert torch.equal(a, b)


def state(shapes: list[tuple[int, ...]], count: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Random tensors `[count, *shape]`: one tensor for one shape, a list for several."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]
    return tensors[0] if len(tensors) == 1 else tensors


def problem(shapes: list[tuple[int, ...]], count: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0):
    """x, energy, grad, proposal, proposal_energy, proposal_grad: unrelated numbers; most are accepted."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0):
        made = [scale * torch.randn(count, *s, generator=generator, dtype=torch.float64) for s in shapes]
        return [tensor.to(dtype) for tensor in made]

    width = math.sqrt(max(sum(math.prod(shape) for shape in shapes), 1))
    x, move, grad, proposal_grad = draw(), draw(1.0 / width), draw(), draw()
    proposal = [a + b for a, b in zip(x, move, strict=True)]
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    energy, proposal_energy = (
        torch.randn(count, generator=generator, dtype=torch.float64).to(scalar) for _ in range(2)
    )
    if len(shapes) == 1:
        return x[0], energy, grad[0], proposal[0], proposal_energy, proposal_grad[0]
    return x, energy, grad, proposal, proposal_energy, proposal_grad
