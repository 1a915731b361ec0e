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

from moai_llm.runtime import MoaiError, did_you_mean

logger = logging.getLogger("moai_llm")
MODULES = (
    "attention",
    "attention_step",
    "causal_conv1d",
    "linear",
    "mamba_step",
    "mlp_step",
    "moe",
    "nf4",
    "norm",
    "selective_scan",
)  # each defines its ops


class Unavailable(RuntimeError):
    """An implementation cannot run on this machine; the message is the reason (no compiler, no GPU, ...)."""


class CannotRun(MoaiError, RuntimeError):
    """The implementation that the user forced cannot run here."""


@dataclass(frozen=True)
class Implementation:
    """`target` is a function, or "module:function" imported when first reached (and free to raise `Unavailable`
    then). `unless` is asked for a reason why it gains nothing on this machine: then it runs only where it is forced.
    """

    target: Callable[..., Any] | str
    dtypes: tuple[torch.dtype, ...] | None = None  # None: any
    unless: Callable[[torch.dtype], str | None] | None = None

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
        check(_forced)
        forced = _forced.get(self.name)
        reasons = []
        for name in [forced] if forced else self.order.get(device_type, self.order["any"]):
            implementation = self.implementations[name]
            if implementation.dtypes is not None and dtype not in implementation.dtypes:
                reasons.append(f"{name} does not take {dtype}")
                continue
            if implementation.unless and not forced and implementation.unless(dtype):
                continue
            try:
                self._loaded[name] = self._loaded.get(name) or implementation.load()
            except Unavailable as error:
                reasons.append(f"{name}: {error}")
                continue
            if reasons:
                logger.info("%s on %s runs %r (%s)", self.name, device_type, name, "; ".join(reasons))
            return name
        if forced:
            what = f"the forced implementation {forced!r} of {self.name!r} cannot run on {device_type}"
            raise CannotRun(f"{what}: {'; '.join(reasons)}")
        raise RuntimeError(f"op {self.name!r} cannot run on {device_type}: {'; '.join(reasons)}")


OPS: dict[str, Op] = {}


def define(name: str, implementations: dict[str, Implementation], order: dict[str, list[str]]) -> Op:
    """Make an op and enter it in `OPS`."""
    OPS[name] = Op(name, implementations, order)
    return OPS[name]


def all_ops() -> dict[str, Op]:
    """Every op, its module imported: the table that `moai ops` prints."""
    for module in MODULES:
        import_module(f"moai_llm.ops.{module}")
    return OPS


def parse_choice(text: str) -> dict[str, str]:
    """ "selective_scan=torch,attention=reference" -> dict, the grammar of `MOAI_OPS`."""
    pairs = [item.split("=") for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise MoaiError(f"MOAI_OPS is a list of op=implementation, got {text!r}")
    return {name.strip(): choice.strip() for name, choice in pairs}


def check(choice: dict[str, str]) -> None:
    """Raises `MoaiError` where a choice names an op or an implementation that is not there."""
    for name, implementation in choice.items():
        if name not in all_ops():
            raise MoaiError(f"there is no op {name!r}{did_you_mean(name, OPS)}; ops are {', '.join(sorted(OPS))}")
        known = OPS[name].implementations
        if implementation not in known:
            hint = did_you_mean(implementation, known)
            raise MoaiError(f"op {name!r} has no implementation {implementation!r}{hint}; it has {', '.join(known)}")


def check_environment() -> None:
    """`check` of what `MOAI_OPS` says."""
    check(_forced)


_forced: dict[str, str] = parse_choice(os.environ.get("MOAI_OPS", ""))


@contextmanager
def use(**choice: str) -> Iterator[None]:
    """Force implementations inside a block: `with use(selective_scan="reference"): ...`.

    Raises:
        MoaiError: at once for an unknown op or implementation; when the op is called for one that cannot run.
    """
    check(choice)
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
