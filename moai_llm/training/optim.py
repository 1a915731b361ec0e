"""Optimizers, which parameters decay, and groups of parameters with a learning rate of their own.

An optimizer here is a function of the model and the recipe. Its states are saved by parameter name and key, whatever
they are called (checkpoint.py), so a new one needs nothing but a line of OPTIMIZERS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moai_llm.optimization import OPTIM_OPTIONS, OptimConfig
from moai_llm.runtime import MoaiError, did_you_mean, has_fast_bf16, require
from moai_llm.training.lion import Lion
from moai_llm.training.muon import Muon
from moai_llm.training.offload import HostAdamW

# recurrence parameters: pulling them to zero would change time constants, not simplify the model
NO_DECAY = ("A_log", "D", "dt_bias")
EMBEDDINGS = re.compile(r"(^|\.)embed_(tokens|positions)\.")
# matrices that Muon leaves to AdamW: what reads and writes tokens, what chooses experts, what is a list of filters
NOT_HIDDEN = re.compile(r"(^|\.)(embed_tokens|embed_positions|lm_head|router)\.|(^|\.)conv_weight$")
SMALLEST_8BIT = 4096  # elements; below, 8 bits save nothing worth their error (the default of bitsandbytes)

Take = Callable[[str, nn.Parameter], bool]
Groups = list[dict[str, Any]]


def make_optimizer(model: nn.Module, config: OptimConfig, *, on_host: bool = False) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over the trainable parameters of a model that is on its device.

    Args:
        on_host: AdamW with its states in the host's memory, see `offload.py`.

    Raises:
        MoaiError: a rule of `optim.groups` finds nothing, the optimizer's package is missing, or it needs a GPU.
    """
    if on_host:
        assert config.name == "adamw"
        return HostAdamW(parameter_groups(model, config), lr=config.lr, **_options(config))
    return OPTIMIZERS[config.name](model, config)


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; norms, biases and the state space's recurrence do not."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NO_DECAY and not name.endswith("bias")


def parameter_groups(model: nn.Module, config: OptimConfig, take: Take = lambda name, parameter: True) -> Groups:
    """Each trainable parameter that `take` takes in one group, by weight decay and share of the learning rate."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rules = _rules(named, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        scale, decay = 1.0, config.weight_decay
        if name in rules:
            rule = config.groups[rules[name]]
            scale, decay = rule.lr_scale, decay if rule.weight_decay is None else rule.weight_decay
        if take(name, parameter):
            groups.setdefault((scale, decay if decays(name, parameter) else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def _rules(named: dict[str, nn.Parameter], config: OptimConfig) -> dict[str, int]:
    """Parameter name -> the first rule of `optim.groups` that finds it."""
    found: dict[str, int] = {}
    for number, rule in enumerate(config.groups):
        matches = [name for name in named if re.search(rule.match, name)]
        where = f"optim.groups[{number}].match {rule.match!r}"
        if not matches:
            raise MoaiError(f"{where} finds no parameter{_similar(rule.match, named)}")
        taken = [name for name in matches if name not in found]
        if not taken:
            raise MoaiError(f"{where} finds only parameters that an earlier rule took: put it before that one")
        if rule.weight_decay and not any(decays(name, named[name]) for name in taken):
            raise MoaiError(
                f"{where} finds only norms, biases and parameters of the recurrence, which never decay: leave out "
                "its weight_decay"
            )
        found.update(dict.fromkeys(taken, number))
    return found


def _similar(pattern: str, names: dict[str, nn.Parameter]) -> str:
    """What there is to find: kinds of parameters, each with one of its names."""
    kinds = {re.sub(r"\d+", "N", name): name for name in reversed(names)}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    words = re.findall(r"\w+", pattern)
    hint = next((found for word in words if (found := did_you_mean(word, parts))), "")
    return f"{hint}; there are {', '.join(reversed(kinds))}, where N is a number"


class Combined(torch.optim.Optimizer):
    """Several optimizers, each over some of the parameters, as one: their groups in a row, one dict of states."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts: Sequence[torch.optim.Optimizer] = ()
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """The parts work on the very groups and states that stand here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def place_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, tensor: Tensor) -> Tensor:
    """A state that was read from a file, in the memory where its optimizer keeps it: on the parameter's device, in the
    host's memory, or in the paged memory of bitsandbytes, which is large because the device's is not.
    """
    if getattr(optimizer, "on_host", False):
        return tensor
    if key in ("state1", "state2"):
        for part in getattr(optimizer, "parts", [optimizer]):
            if getattr(part, "is_paged", False) and any(
                parameter is own for group in part.param_groups for own in group["params"]
            ):
                return part.get_state_buffer(parameter, dtype=tensor.dtype).copy_(tensor)
    return tensor.to(parameter.device)


def _options(config: OptimConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names or OPTIM_OPTIONS[config.name]}


def _combine(*parts: tuple[Callable[[Groups], torch.optim.Optimizer], Groups]) -> torch.optim.Optimizer:
    """Those parts that have parameters."""
    made = [make(groups) for make, groups in parts if groups]
    return made[0] if len(made) == 1 else Combined(*made)


def _adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused: on a CPU several times faster than the default loop, on CUDA the fastest too."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, **_options(config), fused=True)


def _adamw_8bit(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW whose averages take one byte each (arXiv 2110.02861). As there, in section 2.3, embeddings keep 32 bits;
    so do tensors too small to matter.
    """
    bnb = require("bitsandbytes", "bnb")
    options = _options(config)
    return _combine(
        (lambda groups: bnb.optim.AdamW8bit(groups, lr=config.lr, **options),
         parameter_groups(model, config, _takes_8bit)),
        (lambda groups: torch.optim.AdamW(groups, lr=config.lr, **options, fused=True),
         parameter_groups(model, config, lambda name, parameter: not _takes_8bit(name, parameter))),
    )  # fmt: skip


def _paged_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW whose averages move to the host's memory where the GPU's is full (arXiv 2305.14314, section 3)."""
    bnb = _paging(model, config)
    return bnb.optim.PagedAdamW(parameter_groups(model, config), lr=config.lr, **_options(config))


def _paged_adamw_8bit(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    bnb = _paging(model, config)
    options = _options(config)
    return _combine(
        (lambda groups: bnb.optim.PagedAdamW8bit(groups, lr=config.lr, **options),
         parameter_groups(model, config, _takes_8bit)),
        (lambda groups: bnb.optim.PagedAdamW(groups, lr=config.lr, **options),
         parameter_groups(model, config, lambda name, parameter: not _takes_8bit(name, parameter))),
    )  # fmt: skip


def _takes_8bit(name: str, parameter: Tensor) -> bool:
    return parameter.numel() >= SMALLEST_8BIT and not EMBEDDINGS.search(name)


def _paging(model: nn.Module, config: OptimConfig) -> Any:
    bnb = require("bitsandbytes", "bnb")
    device = next(model.parameters()).device
    if device.type != "cuda":
        other = "adamw_8bit" if config.name == "paged_adamw_8bit" else "adamw"
        raise MoaiError(
            f"optim.name={config.name} pages between the memory of a GPU and that of its host; on {device.type} there "
            f"is nothing to page: use optim.name={other}"
        )
    return bnb


def _muon(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Muon for the matrices inside the layers, each expert's too, and AdamW for the rest (arXiv 2502.16982). Updates
    are scaled to the size of AdamW's, so one learning rate and one weight decay serve both.
    """
    dtype = torch.bfloat16 if has_fast_bf16(next(model.parameters()).device) else torch.float32
    return _combine(
        (lambda groups: Muon(groups, lr=config.lr, **_options(config, "momentum"), dtype=dtype),
         parameter_groups(model, config, _is_hidden)),
        (lambda groups: torch.optim.AdamW(groups, lr=config.lr, **_options(config, "betas", "eps"), fused=True),
         parameter_groups(model, config, lambda name, parameter: not _is_hidden(name, parameter))),
    )  # fmt: skip


def _is_hidden(name: str, parameter: Tensor) -> bool:
    return decays(name, parameter) and not NOT_HIDDEN.search(name)


def _adafactor(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235) with the learning rate given, not relative to the weights: then an update is as
    large as AdamW's. That is transformers' form; torch's knows only the relative one.
    """
    from transformers.optimization import Adafactor

    groups = parameter_groups(model, config)
    return Adafactor(groups, lr=config.lr, scale_parameter=False, relative_step=False, warmup_init=False)


def _lion(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return Lion(parameter_groups(model, config), lr=config.lr, **_options(config))


def _sgd(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameter_groups(model, config), lr=config.lr, **_options(config), fused=True)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw": _paged_adamw,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "muon": _muon,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
}
