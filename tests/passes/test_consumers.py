"""What a weight sees, times the matrices it is, must be what the operator computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from graphprune.passes.consumers import Consumers, Product, conv_groups, matrices, put_matrices, seen_by

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


W23, W32, E = rand(2, 3), rand(3, 2), rand(4, 3, 2)
C1, C2, C2G, C3 = rand(6, 4, 3), rand(6, 4, 3, 2), rand(6, 2, 3, 2), rand(6, 4, 1, 2, 3)

# The call, its weight, and the dimension of the weight that is contracted.
CALLS: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor, int]] = {
    "linear": (lambda: functional.linear(rand(5, 7, 3), W23), W23, 1),
    "mm": (lambda: torch.mm(rand(5, 3), W32), W32, 0),
    "matmul": (lambda: rand(5, 7, 3) @ W32, W32, 0),
    "addmm": (lambda: torch.addmm(torch.zeros(2, dtype=torch.float64), rand(5, 3), W32), W32, 0),
    "bmm": (lambda: torch.bmm(rand(4, 5, 3), E), E, 1),
    "matmul of experts": (lambda: torch.matmul(rand(4, 5, 3), E), E, 1),
    "experts share what they see": (lambda: torch.matmul(rand(5, 3), E), E, 1),
    "conv1d": (lambda: functional.conv1d(rand(2, 4, 9), C1, stride=2, padding=1), C1, 1),
    "conv2d": (lambda: functional.conv2d(rand(2, 4, 8, 9), C2, None, 1, 1, 2), C2, 1),
    "conv2d same": (lambda: functional.conv2d(rand(2, 4, 8, 9), C2, padding="same"), C2, 1),
    "conv2d groups": (lambda: functional.conv2d(rand(2, 4, 8, 9), C2G, None, 2, 1, 1, 2), C2G, 1),
    "conv2d of one image": (lambda: functional.conv2d(rand(4, 8, 9), C2), C2, 1),
    "conv3d": (lambda: functional.conv3d(rand(2, 4, 3, 4, 5), C3), C3, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_seen_times_the_matrices_is_the_result(name: str) -> None:
    call, weight, dim = CALLS[name]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(held: torch.Tensor, product: Product, args: tuple, kwargs: dict[str, Any]) -> None:
        seen = seen_by(product, args, kwargs)
        of_weight = matrices(held, dim, product, conv_groups(product, args, kwargs))
        assert torch.equal(put_matrices(of_weight, held, dim, product), held)
        found.append((seen, of_weight))

    with Consumers([weight], see):
        out = call()
    (seen, of_weight), *more = found
    assert not more
    made = seen @ of_weight.mT  # (matrices, rows, out)
    assert made.numel() == out.numel()
    assert torch.allclose(made.flatten().sort().values, out.flatten().sort().values)


def test_only_wanted_weights_are_seen_and_may_be_replaced_with_an_offset() -> None:
    x, offset = rand(5, 3), rand(2)
    with Consumers([W23, W32], lambda weight, product, args, _: product.replaced(args, weight * 2, offset)):
        assert torch.allclose(functional.linear(x, W23), x @ (W23 * 2).T + offset)
        assert torch.allclose(functional.linear(x, W23, offset), x @ (W23 * 2).T + 2 * offset)
        assert torch.allclose(torch.addmm(offset, x, W32), x @ (W32 * 2) + 2 * offset)
        other = W23.clone()
        assert torch.equal(functional.linear(x, other), x @ other.T)
