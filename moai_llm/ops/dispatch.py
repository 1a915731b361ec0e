"""Choose one implementation of an op: a forced one, else the first that can run on this device and dtype.

An op is a function with several implementations of one signature whose first argument is a tensor. `reference` is
always among them and is always right; the others are only faster. Nothing here knows a config.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

logger = logging.getLogger("moai_llm")


class Unavailable(RuntimeError):
    """An implementation cannot run on this machine; the message is the reason (no compiler, no GPU, ...)."""


@dataclass(frozen=True)
class Implementation:
    """`target` is a function, or "module:function" imported when first reached (and free to raise `Unavailable`
    then).
    """

    target: Callable[..., Any] | str
    dtypes: tuple[torch.dtype, ...] | None = None  # None: any

    def load(self) -> Callable[..., Any]:
        if callable(self.target):
            return self.target
        module, _, name = self.target.partition(":")
        try:
            return getattr(import_module(module), name)
        except ImportError as error:
            raise Unavailable(str(error)) from error


class Op:
    """A callable that runs the implementation `pick` chose.

    Args:
        name: key for `use(...)` and the environment variable `MOAI_OPS`.
        implementations: by name; must hold `reference`.
        order: device type -> names, fastest first; the key `any` serves the devices not named.
    """

    def __init__(self, name: str, implementations: dict[str, Implementation], order: dict[str, list[str]]) -> None:
        assert "reference" in implementations and "any" in order
        self.name, self.implementations, self.order = name, implementations, order
        self._picked: dict[tuple[str, torch.dtype], str] = {}
        self._loaded: dict[str, Callable[..., Any]] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._loaded[self.pick(x.device.type, x.dtype)](x, *args, **kwargs)

    @torch.compiler.assume_constant_result
    def pick(self, device_type: str, dtype: torch.dtype = torch.float32) -> str:
        """The name of the implementation that runs for this device and dtype; the first call loads it."""
        key = (device_type, dtype)
        if key not in self._picked:
            self._picked[key] = self._choose(device_type, dtype)
        return self._picked[key]

    def _choose(self, device_type: str, dtype: torch.dtype) -> str:
        forced = _forced.get(self.name)
        reasons = []
        for name in [forced] if forced else self.order.get(device_type, self.order["any"]):
            if name not in self.implementations:
                raise ValueError(
                    f"op {self.name!r} has no implementation {name!r}; there are {sorted(self.implementations)}"
                )
            implementation = self.implementations[name]
            if implementation.dtypes is not None and dtype not in implementation.dtypes:
                reasons.append(f"{name} does not take {dtype}")
                continue
            try:
                self._loaded[name] = self._loaded.get(name) or implementation.load()
            except Unavailable as error:
                reasons.append(f"{name}: {error}")
                continue
            if reasons:
                logger.info("%s on %s runs %r (%s)", self.name, device_type, name, "; ".join(reasons))
            return name
        what = f"the forced implementation {forced!r} of {self.name!r}" if forced else f"op {self.name!r}"
        raise RuntimeError(f"{what} cannot run on {device_type}: {'; '.join(reasons)}")


OPS: dict[str, Op] = {}


def define(name: str, implementations: dict[str, Implementation], order: dict[str, list[str]]) -> Op:
    """Make an op and enter it in `OPS`, the table that `moai ops` prints."""
    OPS[name] = Op(name, implementations, order)
    return OPS[name]


def parse_choice(text: str) -> dict[str, str]:
    """ "selective_scan=torch,attention=reference" -> dict, the grammar of `MOAI_OPS`."""
    pairs = [item.split("=") for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"MOAI_OPS is a list of op=implementation, got {text!r}")
    return {name.strip(): choice.strip() for name, choice in pairs}


_forced: dict[str, str] = parse_choice(os.environ.get("MOAI_OPS", ""))


@contextmanager
def use(**choice: str) -> Iterator[None]:
    """Force implementations inside a block: `with use(selective_scan="reference"): ...`.

    A forced implementation that cannot run raises RuntimeError when the op is called; an unknown op raises ValueError
    at once.
    """
    unknown = sorted(set(choice) - set(OPS))
    if unknown:
        raise ValueError(f"unknown ops {unknown}; there are {sorted(OPS)}")
    before = dict(_forced)
    _forced.update(choice)
    _forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _forget()


def _forget() -> None:
    for op in OPS.values():
        op._picked.clear()
