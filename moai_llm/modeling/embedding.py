"""MoaiForEmbedding: one vector for a text. The decoder of `model.py`, its hidden states pooled, perhaps projected, and
scaled to length one.

What it is made of stands in `config.embedding`, see `Settings`. A directory of a language model loads as one, too: its
head is left out and what it lacks is new.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForTextEncoding
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from moai_llm.config import MoaiConfig
from moai_llm.modeling.linear import Linear
from moai_llm.modeling.model import MASKS, MoaiModel, MoaiPreTrainedModel
from moai_llm.modeling.moe import RouterSums
from moai_llm.ops.pooling import Pooling, keyed_dropout, pool_documents
from moai_llm.runtime import MoaiError

LARGEST_SCALE = 100.0  # of a learned temperature: not below 0.01 (CLIP, arXiv 2103.00020, section 2.5)
POOLINGS = ("mean", "last", "first")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`config.embedding`.

    Attributes:
        pooling: mean | last | first of the hidden states of a text.
        projection: width of a linear layer behind it; none when None.
        normalize: whether vectors have length one.
        bidirectional: whether attention looks ahead. Mamba layers never do.
        dropout: share of the embedded tokens' numbers that training sets to zero.
        temperature: that a learned temperature begins with; it is not learned when None.
    """

    pooling: Pooling = "mean"
    projection: int | None = None
    normalize: bool = True
    bidirectional: bool = False
    dropout: float = 0.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is not one of {', '.join(POOLINGS)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class MoaiEmbeddingOutput(ModelOutput):
    """`embeddings` is (B, D), or of packed rows (B, documents, D)."""

    embeddings: Tensor | None = None
    last_hidden_state: Tensor | None = None
    router: tuple[RouterSums, ...] | None = None


class MoaiForEmbedding(MoaiPreTrainedModel):
    """Token ids to a vector for each text."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: MoaiConfig) -> None:
        super().__init__(config)
        given = config.embedding or {}
        self.settings = Settings(**{f.name: given[f.name] for f in fields(Settings) if f.name in given})
        config.embedding = self.settings.to_dict()
        self.model = MoaiModel(config)
        width = self.settings.projection
        self.projection = Linear(config.hidden_size, width, bias=False) if width else None
        learned = self.settings.temperature is not None
        self.log_scale = nn.Parameter(torch.zeros(())) if learned else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.log_scale is not None:
            init.constant_(self.log_scale, -math.log(cast(float, self.settings.temperature)))

    @property
    def width(self) -> int:
        """Of a vector."""
        return self.settings.projection or int(self.config.hidden_size)

    def scale(self) -> Tensor | None:
        """One over the learned temperature, at most `LARGEST_SCALE`; None where it is not learned."""
        return None if self.log_scale is None else self.log_scale.exp()

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Bring a learned temperature back that a step took below 0.01, as CLIP does: its gradient stays alive."""
        if self.log_scale is not None:
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        documents: int | None = None,
        noise_key: Tensor | None = None,
    ) -> MoaiEmbeddingOutput:
        """
        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 0 where a row of one text is padded, on either side.
            seq_idx: (B, L) of packed rows instead: the number of the text at each position. `documents` says how many
                texts a row may hold; positions of higher numbers are padding.
            noise_key: (B,) int64, what dropout and routing noise depend on.
        """
        packed = seq_idx is not None
        if packed and attention_mask is not None:
            raise ValueError("packed rows say by seq_idx what is padding: leave attention_mask out")
        if seq_idx is None:
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            seq_idx, documents = (seen == 0).to(torch.int32), 1
            if position_ids is None:
                position_ids = (seen.long().cumsum(-1) - 1).clamp_min(0)
        assert documents is not None and position_ids is not None
        output = self.model(
            inputs_embeds=self._embedded(input_ids, noise_key),
            attention_mask=self._masks(seq_idx) if self.settings.bidirectional else None,
            position_ids=position_ids,
            seq_idx=seq_idx,
            token_mask=seq_idx < documents,
            noise_key=noise_key,
            use_cache=False,
        )
        with torch.autocast(input_ids.device.type, enabled=False):
            pooled = pool_documents(output.last_hidden_state, seq_idx, documents, self.settings.pooling)
            if self.projection is not None:
                pooled = F.linear(pooled, self.projection.weight.to(pooled.dtype))
            if self.settings.normalize:
                pooled = F.normalize(pooled, dim=-1)
        return MoaiEmbeddingOutput(pooled if packed else pooled[:, 0], output.last_hidden_state, output.router)

    def _embedded(self, input_ids: Tensor, noise_key: Tensor | None) -> Tensor:
        x: Tensor = self.model.embed_tokens(input_ids)
        if not self.training or not self.settings.dropout:
            return x
        if noise_key is None:
            return F.dropout(x, self.settings.dropout)
        return keyed_dropout(x, self.settings.dropout, noise_key.expand(x.shape[0]))

    def _masks(self, seq_idx: Tensor) -> dict[str, Tensor]:
        """For attention both ways: who looks at whom, (B, 1, L, L)."""
        same = seq_idx[:, None, :, None] == seq_idx[:, None, None, :]
        place = torch.arange(seq_idx.shape[1], device=seq_idx.device)
        near = (place[:, None] - place[None, :]).abs() < (self.config.sliding_window or 1)
        return {kind: same if kind == "full_attention" else same & near for kind in MASKS}


def load_for_vectors(path: str | Path, settings: Settings | None = None, **options: Any) -> MoaiForEmbedding:
    """A model directory as a model that makes vectors.

    Args:
        settings: in place of those it was saved with; a language model has none, and then gets the defaults.

    Raises:
        MoaiError: it cannot be loaded, or its projection has another width than the settings say.
    """
    given: dict[str, Any] = {} if settings is None else {"embedding": settings.to_dict()}
    given = {"dtype": torch.float32, **options, **given}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what a language model lacks is new, as it should be
    try:
        return MoaiForEmbedding.from_pretrained(path, **given)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MoaiError(f"{path} cannot be loaded as a model that makes vectors: {error}") from None
    finally:
        logging.set_verbosity(level)


AutoModelForTextEncoding.register(MoaiConfig, MoaiForEmbedding)
