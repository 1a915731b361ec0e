"""The data of a run: opened as its recipe says, and described."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from moai_llm.data.embedding_loader import EmbeddingLoader
from moai_llm.data.loader import Loader, open_stages
from moai_llm.data.pair_loader import PairLoader
from moai_llm.data.shards import Store
from moai_llm.recipe import Recipe
from moai_llm.representation import CONTRASTIVE
from moai_llm.runtime import MoaiError
from moai_llm.training.objective import Reads

logger = logging.getLogger("moai_llm")


def open_data(
    recipe: Recipe, step_rows: int, device: torch.device, *, reads: Reads = "rows"
) -> Loader | PairLoader | EmbeddingLoader:
    """The loader of `data.train` or `data.stages`; warns of what does not fit into a row.

    Args:
        reads: preference pairs and texts that belong together come from one store.

    Raises:
        MoaiError: what `open_stages` and `Loader` raise; pinned memory without a CUDA device.
    """
    data = recipe.data
    if data.pin_memory and device.type != "cuda":
        raise MoaiError(f"data.pin_memory=true is for a CUDA device, and this run is on {device}: leave it out")
    pinned = device.type == "cuda" if data.pin_memory is None else data.pin_memory
    loaders: dict[Reads, Callable[..., Loader | PairLoader | EmbeddingLoader]] = {
        "rows": Loader, "preference": PairLoader, "embedding": partial(
            EmbeddingLoader, augment=recipe.embedding.augment, augment_share=recipe.embedding.augment_share
        ),
    }  # fmt: skip
    loader = loaders[reads](
        open_stages(data) if reads == "rows" else _one_store(recipe), data.seq_len, recipe.train.seed,
        packing=data.packing, overlong=data.overlong, step_rows=step_rows, pinned=pinned,
    )  # fmt: skip
    if isinstance(loader, EmbeddingLoader) and recipe.loss.type != "info_nce" and not loader.tells_apart:
        raise MoaiError(
            f"{loader.store.path} holds right answers alone, and loss.type={recipe.loss.type} would make all vectors "
            "the same: prepare grades or wrong answers (`moai data mine`), or set loss.type=info_nce"
        )
    for rows in loader.sources:
        packing = rows.packing
        if packing.dropped_tokens:
            logger.warning(
                "%s: %s of %s %s are longer than data.seq_len %s and %s: raise it to keep them whole",
                rows.store.path, int((packing.lengths > data.seq_len).sum()), len(packing.lengths), packing.unit,
                data.seq_len, "are left out" if packing.dropped_documents else "lose their end",
            )  # fmt: skip
    return loader


def _one_store(recipe: Recipe) -> Store:
    """Pairs come from one store: how a mixture of them would be weighed nobody has said."""
    stages = open_stages(recipe.data)
    if len(stages) > 1 or len(stages[0].sources) > 1 or stages[0].sources[0].store.merged:
        what, flag = ("texts", "--embedding") if recipe.loss.type in CONTRASTIVE else ("pairs", "--preference")
        raise MoaiError(f"loss.type={recipe.loss.type} reads one store of {what}, not a mixture or stages: prepare the "
                        f"sources together, `moai data prepare A B {flag}`")  # fmt: skip
    return stages[0].sources[0].store


def describe(recipe: Recipe, loader: Loader | PairLoader | EmbeddingLoader, total: int) -> list[str]:
    """Lines for people: the rows of each store, how often it is read, and the stages with their mixtures."""
    names = [str(rows.store.path) for rows in loader.sources]
    if len(names) == len(loader.stages) == 1:
        return [f"data, {recipe.data.packing}: {loader.sources[0].packing.summary()}"]
    assert isinstance(loader, Loader)
    read = loader.curriculum.read(total * loader.step_rows)
    lines = [
        f"data, {recipe.data.packing}, {name}: {rows.packing.summary()}; read {count / len(rows):.2f} times"
        for name, rows, count in zip(names, loader.sources, read.tolist())
    ]
    for i, (span, quotas) in enumerate(zip(loader.curriculum.spans, loader.curriculum.quotas), 1):
        shares = ", ".join(f"{share:.2%} {names[n]}" for n, share in zip(span.weights, quotas.shares))
        begin, end = span.first // loader.step_rows + 1, total
        if span.last is not None:
            end = min(total, span.last // loader.step_rows)
        steps = f"steps {begin:,} to {end:,}" if begin <= end else f"from step {begin:,}, which this run does not reach"
        lines.append(f"stage {i}, {steps}: {shares}" if len(loader.stages) > 1 else f"mixture: {shares}")
    return lines
