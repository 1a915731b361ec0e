"""What a model that makes vectors of texts is, as plain data: the section `embedding` of a recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from moai_llm.bounds import Beta, Count

CONTRASTIVE = ("info_nce", "pairwise", "cosine")  # values of loss.type: losses over vectors of texts


@dataclass(kw_only=True)
class EmbeddingConfig:
    #: a text's vector is the mean of its hidden states, the last, or the first
    pooling: Literal["mean", "last", "first"] = "mean"
    #: width of a linear layer behind it; None: none
    projection: Count | None = None
    #: vectors of length one
    normalize: bool = True
    #: attention looks ahead as well; Mamba layers never do
    bidirectional: bool = False
    #: share of the embedded tokens' numbers that training sets to zero
    dropout: Beta = 0.0
    #: how a text that stands alone gets a right answer: none | twins (itself, under another dropout) | crop (two
    #: stretches of it) | delete (itself, tokens left out)
    augment: Literal["none", "twins", "crop", "delete"] = "none"
    #: crop: the least share of a text that is kept, None: 0.5; delete: the share that is left out, None: 0.1
    augment_share: Beta | None = None

    def check(
        self, loss: str, params: Mapping[str, float] = {}, adapters: int = 0, prompts: Collection[str] = ()
    ) -> None:  # fmt: skip
        """What a type cannot say.

        Args:
            loss, params: `loss.type` and `loss.params`. adapters: `lora.rank`. prompts: `eval.prompts`.

        Raises:
            ValueError: it contradicts itself or the rest of the recipe.
        """
        if loss not in CONTRASTIVE:
            if self != EmbeddingConfig():
                raise ValueError(
                    f"embedding does nothing with loss.type={loss}: set loss.type=info_nce, or leave it out"
                )
            return
        if self.pooling == "first" and not self.bidirectional:
            raise ValueError(
                "embedding.pooling=first takes a token that sees nothing but itself: set embedding.bidirectional=true, "
                "or embedding.pooling=last"
            )
        if self.augment == "twins" and not self.dropout:
            raise ValueError(
                "embedding.augment=twins makes pairs that only dropout tells apart: set embedding.dropout=0.1"
            )
        if self.augment_share is not None and self.augment not in ("crop", "delete"):
            raise ValueError(
                f"embedding.augment_share does nothing with embedding.augment={self.augment}: leave it out"
            )
        if not self.normalize and loss != "info_nce":
            raise ValueError(f"loss.type={loss} compares cosines: leave out embedding.normalize=false")
        if prompts:
            raise ValueError(
                f"eval.prompts are continued by a language model, and loss.type={loss} trains one that makes vectors: "
                "leave them out"
            )
        if adapters and (self.projection or params.get("learned_temperature")):
            new = "embedding.projection" if self.projection else "loss.params.learned_temperature"
            raise ValueError(
                f"lora.rank={adapters} trains adapters alone, and {new} makes new weights: leave one of them out"
            )
