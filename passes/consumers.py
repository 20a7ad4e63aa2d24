"""Consumer matrices while a model runs: which operators multiply by a weight, and what the weight sees.

Every such operator is one or several products ``y = W x`` of a matrix with the vectors that it sees. Several are the
experts of a batched weight and the groups of a convolution; of a convolution the vectors are its patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

functional = nn.functional


@dataclass(frozen=True)
class Product:
    """How an operator uses a weight.

    ``x`` and ``weight`` are the places of its arguments. ``dim`` is the dimension of ``x`` that is contracted. A
    ``batched`` weight may have more dimensions in front of its matrix, ``convolution`` has patches. ``bias`` is the
    place of what is added to the result.
    """

    x: int
    weight: int
    dim: int = -1
    batched: bool = False
    convolution: bool = False
    bias: int | None = None

    def replaced(self, args: tuple, weight: torch.Tensor, offset: torch.Tensor | None = None) -> tuple:
        """``args`` with another weight, and with ``offset`` added to the bias; one that is not there becomes it."""
        given: list[Any] = list(args)
        given[self.weight] = weight
        if offset is not None and self.bias is not None:
            given += [None] * (self.bias + 1 - len(given))
            old = given[self.bias]
            given[self.bias] = (offset if old is None else old + offset).to(weight.dtype)
        return tuple(given)


_PRODUCTS: dict[Any, Product] = {
    functional.linear: Product(0, 1, bias=2),
    torch.addmm: Product(1, 2, bias=0),
    torch.mm: Product(0, 1),
    **dict.fromkeys(
        (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm),
        Product(0, 1, batched=True),
    ),
    torch.baddbmm: Product(1, 2, batched=True),
    **dict.fromkeys(
        (functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
        Product(0, 1, 1, convolution=True, bias=2),
    ),
}


class Consumers(TorchFunctionMode):
    """Calls ``see(weight, product, args, kwargs)`` before any of the wanted weights multiplies.

    What it returns, if anything, are the arguments to call the operator with instead.
    """

    def __init__(self, wanted: Iterable[torch.Tensor], see: Callable[..., tuple | None]):
        super().__init__()
        self._wanted = {id(weight) for weight in wanted}
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None and len(args) > product.weight and id(args[product.weight]) in self._wanted:
            args = self._see(args[product.weight], product, args, kwargs) or args
        return func(*args, **kwargs)


def matrices(weight: torch.Tensor, dim: int, product: Product | None, groups: int = 1) -> torch.Tensor:
    """``weight`` as matrices of shape ``(count, out, columns)``; ``dim`` is the dimension that it is contracted along.

    The columns of a convolution are (channel, place in the patch). Where it is not known how the weight is used, it is
    one matrix.
    """
    if product is not None and product.convolution:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    if product is not None and weight.ndim > 2:
        return (weight if dim == weight.ndim - 1 else weight.mT).flatten(0, -3)
    return weight.movedim(dim, -1).reshape(1, -1, weight.shape[dim])


def put_matrices(changed: torch.Tensor, weight: torch.Tensor, dim: int, product: Product | None) -> torch.Tensor:
    """:func:`matrices` undone: a tensor of the shape and dtype of ``weight``."""
    if product is not None and product.convolution:
        changed = changed.reshape(weight.shape)
    elif product is not None and weight.ndim > 2:
        changed = (changed if dim == weight.ndim - 1 else changed.mT).reshape(weight.shape)
    else:
        changed = changed.reshape(weight.movedim(dim, -1).shape).movedim(-1, dim)
    return changed.to(weight.dtype).contiguous()


def seen_by(product: Product, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """What each matrix of the weight sees: shape ``(count, rows, columns)``, in the dtype of the activations."""
    x, weight = args[product.x].detach(), args[product.weight]
    if product.convolution:
        return _patches(args, kwargs)
    if not product.batched or weight.ndim <= 2:
        return x.movedim(product.dim, -1).reshape(1, -1, x.shape[product.dim])
    batch = weight.shape[:-2]  # (..., *batch, rows, columns) → (*batch, …)
    x = x.expand(*torch.broadcast_shapes(x.shape[:-2], batch), *x.shape[-2:])
    more = x.ndim - 2 - len(batch)
    x = x.movedim(tuple(range(more)), tuple(range(-2 - more, -2)))
    return x.reshape(math.prod(batch), -1, x.shape[-1])


def channels_seen_by(product: Product, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """:func:`seen_by` with the channels of a convolution for columns, those of its groups below one another."""
    if not product.convolution:
        return seen_by(product, args, kwargs)
    x, weight = args[product.x].detach(), args[product.weight]
    return x.movedim(1 - weight.ndim, -1).reshape(1, -1, weight.shape[1])


def conv_groups(product: Product, args: tuple, kwargs: dict[str, Any]) -> int:
    """The number of groups of a convolution, 1 of anything else."""
    return int(args[6] if len(args) > 6 else kwargs.get("groups", 1)) if product.convolution else 1


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _patches(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The patches that a convolution sees, by a convolution with one-hot kernels, which knows strides and dilations."""
    named = dict(zip(_CONVOLUTION, args, strict=False)) | kwargs
    x, weight, groups = named["input"].detach(), named["weight"], int(named.get("groups", 1))
    size = weight[0].numel()
    one_hot = torch.eye(size, dtype=x.dtype, device=x.device).view(size, *weight.shape[1:])
    one_hot = one_hot.repeat(groups, *[1] * (weight.ndim - 1))
    options = {name: named[name] for name in ("stride", "padding", "dilation") if name in named}
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.ndim - 3]
    if x.ndim == weight.ndim - 1:  # without a batch
        x = x.unsqueeze(0)
    with torch._C.DisableTorchFunction():
        patches = convolve(x, one_hot, None, groups=groups, **options)
    return patches.unflatten(1, (groups, size)).movedim(0, 2).flatten(2).transpose(1, 2)
