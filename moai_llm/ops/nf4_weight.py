"""A frozen weight that lies in memory in 4 bits and is read as the tensor it stands for.

Wherever torch reads it, it is unpacked for that moment. Autograd keeps it as it lies, so that no unpacked copy waits
for the backward; `F.linear`, which would keep a transposed one, has an autograd function here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from moai_llm.ops.nf4 import BLOCK, Packed, pack, unpack

aten = torch.ops.aten


class NF4Weight(Tensor):
    """Shape, dtype and device are those of the weight it stands for; nothing can be written to it."""

    packed: Packed

    @staticmethod
    def __new__(cls, packed: Packed, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> NF4Weight:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.codes.device)

    def __init__(self, packed: Packed, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> None:
        self.packed = packed

    @classmethod
    def of(cls, weight: Tensor, *, double: bool = True) -> NF4Weight:
        return cls(pack(weight, double=double), weight.shape, weight.dtype)

    def unpacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """An ordinary tensor."""
        return unpack(self.packed, self.shape, dtype or self.dtype)

    def _item(self, index: Any) -> Tensor:
        """Of one expert of many only its blocks are unpacked, where blocks end with it."""
        size = self.shape[1:].numel()
        if not isinstance(index, int) or size % BLOCK:
            return self.unpacked()[index]
        first = index % self.shape[0] * (size // BLOCK)
        return unpack(self.packed.blocks(first, first + size // BLOCK), self.shape[1:], self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"NF4Weight({tuple(self.shape)}, {self.dtype}, {self.packed.nbytes} bytes)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], cls):
            return _Linear.apply(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            # views, which inference mode lets only the tensor itself make
            if func is Tensor.__getitem__:
                return args[0]._item(args[1])
            if func is Tensor.unbind:
                return args[0].unpacked().unbind(*args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs, weight = kwargs or {}, args[0]
        if isinstance(weight, cls):
            if func in (aten.detach.default, aten.alias.default):
                return cls(weight.packed, weight.shape, weight.dtype)
            if func is aten._to_copy.default:
                packed = weight.packed.to(kwargs.get("device") or weight.device)
                return cls(packed, weight.shape, kwargs.get("dtype") or weight.dtype)
            if func._schema.is_mutable:
                if func is aten.set_.source_Tensor and getattr(args[1], "packed", None) is weight.packed:
                    return weight  # how torch puts a parametrization on a parameter
                raise TypeError(f"{func} writes to a weight in 4 bits, which stays as it is")
        args, kwargs = tree_map_only(cls, lambda each: each.unpacked(), (args, kwargs))
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    """x W^T + bias, for which the backward unpacks W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.weight = weight
        return F.linear(x.to(dtype), weight.unpacked(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad,) = grads
        of_x, _, of_bias = (*ctx.needs_input_grad, False)[:3]
        return (
            grad @ ctx.weight.unpacked(grad.dtype) if of_x else None,
            None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
        )


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor takes in memory."""
    return tensor.packed.nbytes if isinstance(tensor, NF4Weight) else tensor.numel() * tensor.element_size()
