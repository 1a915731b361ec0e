"""How a model is optimised, as plain data: the sections `optim`, `schedule`, `clip` and `lora` of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from moai_llm.bounds import Beta, Count, NotNegative, Positive, Share

# optim.name -> the options it has, with their defaults; another option would do nothing and is refused
_ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
OPTIM_OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw_8bit": _ADAM,
    "paged_adamw": _ADAM,
    "paged_adamw_8bit": _ADAM,
    "muon": {**_ADAM, "momentum": 0.95},
    "adafactor": {},
    "lion": {"betas": (0.9, 0.99)},
    "sgd": {"momentum": 0.9},
}
# linear layers that stay as they are where the others are in 4 bits: a loss reads the weights of the output layer, and
# the recurrence of Mamba takes its step sizes from the other two
NF4_KEPT = ("lm_head", "x_proj", "dt_proj")


@dataclass(kw_only=True)
class GroupRule:
    """Other settings for the parameters whose name a regular expression finds; of several rules the first counts."""

    match: str
    #: times `optim.lr`
    lr_scale: NotNegative = 1.0
    #: in place of optim.weight_decay, where there is decay at all
    weight_decay: NotNegative | None = None


@dataclass(kw_only=True)
class OptimConfig:
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon", "adafactor", "lion", "sgd"] = (
        "adamw"
    )
    lr: NotNegative = 3e-4
    #: of AdamW and Lion; None becomes the optimizer's own default (OPTIM_OPTIONS), likewise below
    betas: tuple[Beta, Beta] | None = None
    #: of AdamW
    eps: NotNegative | None = None
    #: of Muon and SGD
    momentum: Beta | None = None
    #: on matrices, not on norms, biases or the state space's A_log, D and dt_bias
    weight_decay: NotNegative = 0.1
    groups: list[GroupRule] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in OPTIM_OPTIONS.get(self.name, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self) -> None:
        """What a type cannot say.

        Raises:
            ValueError: an option that this optimizer does not have, or a rule that is no regular expression.
        """
        for name in ("betas", "eps", "momentum"):
            if getattr(self, name) is not None and name not in OPTIM_OPTIONS[self.name]:
                raise ValueError(f"{name} does nothing with optim.name={self.name}: leave it out, or set it to null")
        for number, rule in enumerate(self.groups):
            try:
                re.compile(rule.match)
            except re.error as error:
                raise ValueError(
                    f"groups[{number}].match {rule.match!r} is not a regular expression: {error}"
                ) from None


@dataclass(kw_only=True)
class ScheduleConfig:
    #: what follows the warmup: warmup-stable-decay (arXiv 2410.05192) | cosine | linear | constant | inverse_sqrt |
    #: plateau (falls when the evaluations stop getting better)
    name: Literal["wsd", "cosine", "linear", "constant", "inverse_sqrt", "plateau"] = "wsd"
    #: steps, or with a value below 1 a share of all steps
    warmup: NotNegative = 0.02
    #: share of all steps in which wsd decays
    decay: Share = 0.2
    #: how wsd decays
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    #: the lowest learning rate, as a share of `optim.lr`
    min_ratio: Share = 0.0
    #: what plateau multiplies the learning rate with
    plateau_factor: Share = 0.5
    #: evaluations without a better loss that plateau lets pass
    plateau_patience: Annotated[int, Ge(0)] = 2


@dataclass(kw_only=True)
class ClipConfig:
    #: norm (train.max_grad_norm alone) | percentile of the norms so far (arXiv 2007.14469) | agc, by unit (2102.06171)
    name: Literal["norm", "percentile", "agc"] = "norm"
    #: of the norms of the last `history` steps
    percentile: Annotated[float, Ge(0), Le(100)] = 10.0
    history: Count = 1000
    #: agc: the largest gradient of a unit, as a share of its weights
    ratio: Positive = 0.01
    #: agc: weights count as at least this large
    eps: Positive = 1e-3


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters on a frozen model (arXiv 2106.09685); `training/lora.py` puts them there."""

    #: of the matrices an adapter adds; 0: no adapters, all weights are trained
    rank: Annotated[int, Ge(0)] = 0
    #: what an adapter adds is multiplied by alpha / rank
    alpha: Positive = 16.0
    #: share of an adapter's inputs that are dropped while training
    dropout: Beta = 0.0
    #: all-linear, or regular expressions that find linear layers by name; never the output layer
    targets: Literal["all-linear"] | list[str] = "all-linear"
    #: adapters on the stacked weights of experts, too
    experts: bool = False
    #: keep the frozen matrices in 4 bits, nf4 (QLoRA, arXiv 2305.14314); null: in fp32
    quantize: Literal["nf4"] | None = None
    #: the scales of those in bytes, too
    double_quant: bool = True

    def check(self) -> None:
        """Raises ValueError, beginning with the key, for what does nothing or cannot be."""
        if not self.rank and self != LoraConfig():
            raise ValueError(
                "rank=0 is off, so the other keys of lora do nothing: set lora.rank, 16 for example"
                + (". Weights in 4 bits cannot be trained, only adapters on them" if self.quantize else "")
            )
        if not self.double_quant and self.quantize is None:
            raise ValueError("double_quant=false does nothing without lora.quantize: set lora.quantize=nf4")
        if self.targets == [] and not self.experts:
            raise ValueError("targets is empty: name linear layers, or set lora.experts=true")
        if self.experts and self.dropout:
            raise ValueError(
                "dropout is not there for experts, whose adapters are added to their weights: leave it out"
            )
        for pattern in self.targets if isinstance(self.targets, list) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"targets: {pattern!r} is not a regular expression: {error}") from None
