"""Give a model another vocabulary: new embedding and head rows, made from the old ones. Sees ids, never a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moai_llm.runtime import MoaiError, did_you_mean

CHUNK = 512  # new rows made at a time, in fp64

Row = tuple[int, ...]  # old ids that a new row is made from; () where there are none


@torch.no_grad()
def resize_vocabulary(
    model: Any, rows: Sequence[Row], *, init: str = "mean", used: Collection[int] | None = None, seed: int = 0
) -> None:
    """Replace the embedding and the head (its bias too, if it has one) of a causal language model in place.

    Row i becomes a copy of old row `rows[i][0]` where that is a single one. Where there are several it is made from
    them by `init`, where there are none it is the mean of the old rows in `used`. Sums are taken in fp64 and rounded
    once to the dtype of the weights. A tied head stays tied. Beside the new weights themselves this needs memory for
    a chunk of rows only.

    Args:
        rows: one tuple of old ids for each row of the new vocabulary.
        init: mean | last | first: of the old rows; random: a normal draw with the mean and the standard deviation that
            each dimension has over the old rows in `used`.
        used: old ids that a token uses; all when None.
        seed: of the random rows.

    Raises:
        MoaiError: no such init, an id that the model does not have, or a model whose embedding or head is not a plain
            matrix over the vocabulary.
    """
    if init not in INITS:
        raise MoaiError(f"init {init!r} is unknown; there are {', '.join(INITS)}{did_you_mean(init, INITS)}")
    embedding, head = _require_matrices(model)
    size = embedding.weight.shape[0]
    out_of_range = [i for row in rows for i in row if not 0 <= i < size]
    if out_of_range:
        raise MoaiError(f"the model has {size:,} rows in its embedding, so there is no row {out_of_range[0]}")
    known = torch.tensor(sorted(used) if used is not None else range(size))
    tied = head is not None and head.weight is embedding.weight
    generator = torch.Generator().manual_seed(seed)

    def renewed(old: Tensor) -> nn.Parameter:
        return nn.Parameter(_new_rows(old.detach(), rows, init, known, generator), requires_grad=old.requires_grad)

    embedding.weight = renewed(embedding.weight)
    embedding.num_embeddings, embedding.padding_idx = len(rows), None
    if head is not None:
        head.weight = embedding.weight if tied else renewed(head.weight)
        head.out_features = len(rows)
        if head.bias is not None:
            head.bias = renewed(head.bias)
    model.config.get_text_config().vocab_size = len(rows)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == size:
            module.vocab_size = len(rows)


def _new_rows(old: Tensor, rows: Sequence[Row], init: str, used: Tensor, generator: torch.Generator) -> Tensor:
    """(V, ...) -> (new V, ...) in the dtype and on the device of the old rows."""
    shape = old.shape[1:]
    old = old.reshape(old.shape[0], -1)
    center, spread = _moments(old, used)
    new = old.new_empty((len(rows), old.shape[1]))
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        chunk = center.expand(len(part), -1).clone()
        for several, make in ((False, _mean), (True, INITS[init])):
            where = [i for i, row in enumerate(part) if row and (len(row) > 1) == several]
            if not where:
                continue
            if make is None:
                noise = torch.randn((len(where), old.shape[1]), generator=generator, dtype=torch.float64)
                chunk[where] = center + spread * noise.to(old.device)
            else:
                chunk[where] = make(old, [part[i] for i in where])
        new[start : start + len(part)] = chunk.to(old.dtype)
    return new.reshape(len(rows), *shape)


def _moments(old: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (H,) of the used rows, in fp64, without a copy of them all."""
    total, square = old.new_zeros((2, old.shape[1]), dtype=torch.float64).unbind(0)
    for ids in used.split(CHUNK):
        total += old[ids].double().sum(0)
    center = total / len(used)
    for ids in used.split(CHUNK):
        square += (old[ids].double() - center).square().sum(0)
    return center, (square / len(used)).sqrt()


def _mean(old: Tensor, rows: Sequence[Row]) -> Tensor:
    counts = torch.tensor([len(row) for row in rows], device=old.device)
    owner = torch.repeat_interleave(torch.arange(len(rows), device=old.device), counts)
    flat = torch.tensor([i for row in rows for i in row], device=old.device)
    sums = old.new_zeros((len(rows), old.shape[1]), dtype=torch.float64).index_add_(0, owner, old[flat].double())
    return sums / counts[:, None]


def _last(old: Tensor, rows: Sequence[Row]) -> Tensor:
    return old[[row[-1] for row in rows]].double()


def _first(old: Tensor, rows: Sequence[Row]) -> Tensor:
    return old[[row[0] for row in rows]].double()


# how rows of several old ids are made; None: drawn
INITS: dict[str, Callable[[Tensor, Sequence[Row]], Tensor] | None] = {
    "mean": _mean, "last": _last, "first": _first, "random": None,
}  # fmt: skip


def _require_matrices(model: Any) -> tuple[nn.Embedding, nn.Linear | None]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = isinstance(embedding, nn.Embedding) and embedding.weight.is_floating_point()
    if not plain or (head is not None and not isinstance(head, nn.Linear)):
        raise MoaiError(
            f"{type(model).__name__} embeds with {type(embedding).__name__} and ends in {type(head).__name__}: only "
            "plain matrices can be given another vocabulary"
        )
    sizes = [part.weight.shape[0] for part in (head, embedding) if part is not None]
    if sizes[0] != sizes[-1]:
        raise MoaiError(f"{type(model).__name__} has {sizes[0]:,} rows in its head and {sizes[1]:,} in its embedding")
    return embedding, head
