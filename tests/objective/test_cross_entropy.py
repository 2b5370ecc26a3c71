"""Against `F.cross_entropy` of all logits at once. The vocabulary is prime, so that no chunk divides anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.objective import cross_entropy as module
from retrofit.objective.cross_entropy import cross_entropy

V = 37
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def consuming(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, consume=True)


def draw(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, targets, gradients of the losses); targets at both ends of the vocabulary come first."""
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(V, (rows,), generator=generator)
    targets[: min(2, rows)] = torch.tensor([0, V - 1])[:rows]
    logits = 4 * torch.randn(rows, V, generator=generator)
    return logits.to(dtype), targets, torch.randn(rows, generator=generator)


def run(loss: Loss, logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, gradient) of logits that are computed, as a head's are."""
    leaf = logits.clone().requires_grad_()
    losses = loss(leaf.clone(), targets)
    losses.backward(scale)
    assert leaf.grad is not None and losses.dtype == torch.float32 and leaf.grad.dtype == logits.dtype
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("loss", [cross_entropy, consuming])
@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize("rows", [0, 1, 2, 13])
def test_values_and_gradients_are_the_plain_ones_for_every_chunk(
    monkeypatch: pytest.MonkeyPatch, loss: Loss, chunk: int, rows: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * chunk)
    found, expected = run(loss, *draw(rows)), run(plain, *draw(rows))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, consuming])
def test_in_bfloat16_the_gradient_is_rounded_once_as_in_the_plain_way(loss: Loss) -> None:
    logits, targets, scale = draw(500, torch.bfloat16)
    exact = run(lambda x, t: F.cross_entropy(x, t, reduction="none").float(), logits.double(), targets, scale.double())
    ours, theirs = run(loss, logits, targets, scale), run(plain, logits, targets, scale)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6)
    errors = [(gradient.double() - exact[1]).abs() for gradient in (ours[1], theirs[1])]
    assert (errors[0] <= 2**-8 * exact[1].abs() + 1e-7).all()
    assert errors[0].norm() <= 1.0001 * errors[1].norm()


@pytest.mark.parametrize("loss", [cross_entropy, consuming])
def test_extreme_logits_are_exact(loss: Loss) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [0.0, -torch.inf, 0.0], [0.0, -torch.inf, 0.0]])
    targets, scale = torch.tensor([0, 1, 2, 1]), torch.ones(4)
    losses, gradient = run(loss, logits, targets, scale)
    assert torch.equal(losses, torch.tensor([0.0, 2e4, torch.tensor(2.0).log(), torch.inf]))
    rows = [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.5, 0.0, -0.5], [0.5, -1.0, 0.5]]
    assert torch.equal(gradient, torch.tensor(rows))
    assert torch.equal(gradient, run(plain, logits, targets, scale)[1])


@pytest.mark.parametrize("target", [-100, -1, V])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(torch.zeros(1, V), torch.tensor([target]))


def test_logits_that_are_not_consumed_stay_as_they_were() -> None:
    logits, targets, scale = draw(5)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, targets)
    losses.backward(scale, retain_graph=True)
    assert leaf.grad is not None and torch.equal(leaf, logits)
    once = leaf.grad.clone()
    losses.backward(scale)
    assert torch.equal(leaf.grad, 2 * once)


def test_consumed_logits_hold_their_gradient_and_refuse_every_later_reader() -> None:
    logits, targets, scale = draw(5)
    computed = logits.requires_grad_() * 1
    squares = computed.square().sum()
    losses = cross_entropy(computed, targets, consume=True)
    (gradient,) = torch.autograd.grad(losses, computed, scale, retain_graph=True)
    assert gradient.data_ptr() == computed.data_ptr()
    for later in (losses.sum(), squares):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()


class Largest(TorchDispatchMode):
    """Notes the largest float32 tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.size = max(self.size, result.nbytes)
        return result


@pytest.mark.parametrize("loss", [cross_entropy, consuming])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_float32_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch, loss: Loss, grad: bool) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * 10)
    logits, targets, scale = draw(95, torch.bfloat16)
    with Largest() as largest, torch.set_grad_enabled(grad):
        losses = loss(logits.requires_grad_(grad) * 1, targets)
        if grad:
            losses.backward(scale)
    assert 0 < largest.size <= 4 * V * 10
