"""Of which gradients a backward pass is, seen from inside an `autograd.Function`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels import asked
from evalp_fast.kernels.asked import any_is_asked_for

Total = Callable[[Tensor, Tensor, Tensor], Tensor]
Ask = Callable[[Total, Tensor, Tensor, Tensor], Any]

TOLD: list[tuple[bool, bool]] = []


class Sum(torch.autograd.Function):
    """z·v + w, with arguments in between that are no tensors; it computes what it is asked for."""

    @staticmethod
    def forward(z: Tensor, nothing: None, number: int, v: Tensor, index: Tensor, w: Tensor) -> Tensor:
        return z * v + w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, v = ctx.saved_tensors
        state, weights = any_is_asked_for(ctx, 0, 1), any_is_asked_for(ctx, 3, 6)
        if not torch.compiler.is_compiling():
            TOLD.append((state, weights))
        grad_z = grad * v if state else None
        return (grad_z, None, None, grad * z, None, grad) if weights else (grad_z, *(None,) * 5)


def total(z: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return Sum.apply(z, None, 3, v, torch.arange(2), w).sum()


def total_of_torch(z: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return (z * v + w).sum()


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    z, v, w = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    return z.clone().requires_grad_(), v.clone().requires_grad_(), w.clone().requires_grad_()


def backward(value: Tensor, *leaves: Tensor, **options: Any) -> list[Tensor | None]:
    value.backward(**options)
    return [leaf.grad for leaf in leaves]


grad = torch.autograd.grad
ASKS: dict[str, tuple[Ask, tuple[bool, bool]]] = {
    "state": (lambda f, z, v, w: grad(f(z, v, w), z), (True, False)),
    "state within": (lambda f, z, v, w: [grad(f(x, v, w), x) for x in [z * 2.0]], (True, False)),
    "state, to be differentiated": (
        lambda f, z, v, w: grad(grad(f(z, v, w), z, create_graph=True)[0].sum(), v),
        (True, False),
    ),
    "state, weights computed": (lambda f, z, v, w: grad(f(z, v * 2.0, w.exp()), z), (True, False)),
    "first weight": (lambda f, z, v, w: grad(f(z, v, w), v), (False, True)),
    "last weight": (lambda f, z, v, w: grad(f(z, v, w), w), (False, True)),
    "behind a weight": (lambda f, z, v, w: grad(f(z, v * 2.0, w), v), (False, True)),
    "state and a weight": (lambda f, z, v, w: grad(f(z, v, w), (z, w)), (True, True)),
    "all": (lambda f, z, v, w: backward(f(z, v, w), z, v, w), (True, True)),
    "those named": (lambda f, z, v, w: backward(f(z, v, w), z, v, w, inputs=[z]), (True, False)),
    "all that need one": (lambda f, z, v, w: backward(f(z.detach(), v, w), v, w), (False, True)),
    "weights constant": (lambda f, z, v, w: backward(f(z, v.detach(), w.detach()), z), (True, False)),
    "one weight constant": (lambda f, z, v, w: grad(f(z, v.detach(), w), z), (True, False)),
    "a transform, of the state": (lambda f, z, v, w: torch.func.grad(f)(z, v, w), (True, False)),
    "a transform, of a weight": (lambda f, z, v, w: torch.func.grad(f, 1)(z, v, w), (False, True)),
}


@pytest.mark.parametrize(("ask", "expected"), ASKS.values(), ids=ASKS)
def test_what_a_backward_pass_is_for(ask: Ask, expected: tuple[bool, bool]) -> None:
    """Guards against edges that are counted with the arguments, and against a gradient that is left out."""
    TOLD.clear()
    torch.testing.assert_close(ask(total, *tensors()), ask(total_of_torch, *tensors()), rtol=0, atol=0)
    assert [expected] == TOLD


def test_without_the_engines_word_all_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "_executes", None)
    TOLD.clear()
    grad(total(*(leaves := tensors())), leaves[0])
    assert TOLD == [(True, True)]


def test_a_compiled_backward_pass_computes_what_is_asked_later() -> None:
    """Guards against a graph that holds the answer of the pass for which it was traced."""
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    leaves = tensors()
    grad(compiled(*leaves), leaves[0])
    found = grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, grad(total_of_torch(*leaves), leaves), rtol=0, atol=0)
