"""Which checks belong to what: a model built from a recipe, weights, a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_llm.architecture import Architecture
from moai_llm.config import MoaiConfig
from moai_llm.data.loader import Batch, Loader
from moai_llm.data.shards import Store
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.optimization import LoraConfig
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError
from moai_llm.training.build import build_model
from moai_llm.training.doctor import history, laws, learning
from moai_llm.training.doctor.finding import Finding
from moai_llm.training.doctor.machine import BYTES_PER_PARAMETER, free_bytes, size
from moai_llm.training.events import read_metrics

ROWS, LENGTH = 4, 64  # of the batch the checks run on: what they look for shows on few tokens
MOST_ROWS = 64


def fits(model: Architecture, device: torch.device, name: str) -> Finding:
    """Whether weights, gradients and AdamW of this model have room now."""
    count = model.parameters()["total"]
    needed, free = count * BYTES_PER_PARAMETER, free_bytes(device)
    numbers = {"parameters": count, "needed_bytes": needed, "free_bytes": free}
    seen = f"{count:,} parameters: {size(needed)} of weights, gradients and AdamW, {size(free)} free"
    if needed > free:
        advice = (
            f"the checks need the model. Its bricks can be checked on fewer layers: moai doctor {name} "
            "model.num_hidden_layers=2; presets have a small twin, such as moai-3b-tiny"
        )
        return Finding("size", "fail", seen, advice, numbers)
    return Finding("size", "ok", seen, numbers=numbers)


def of_recipe(recipe: Recipe, name: str, device: torch.device) -> Iterator[Finding]:
    """Builds the model of a recipe, untrained or from train.init_from, and checks it on the recipe's data, or, where it
    names none, on random tokens. With `lora` it is the model below the adapters, which begin as nothing; with fp8 it is
    the one without, whose laws hold to the last digits.
    """
    recipe = replace(recipe, lora=LoraConfig(), train=replace(recipe.train, precision="fp32"))
    torch.manual_seed(recipe.train.seed)
    stores = recipe.data.stores()
    if stores:
        tokenizer = Store(stores[0]).tokenizer()
        recipe.model.vocab_size = tokenizer.padded_vocab_size
    room = fits(recipe.model, device, name)
    yield room
    if room.verdict == "fail":
        return
    if stores:
        model = build_model(recipe, tokenizer, device)
    else:
        if recipe.train.init_from:
            raise MoaiError("train.init_from is set and data.train is not: run `moai doctor` on that model itself")
        fields = {key: getattr(recipe.model, key) for key in recipe.model.__dataclass_fields__}
        model = MoaiForCausalLM(MoaiConfig(**fields)).to(device).train()  # type: ignore[arg-type]
    yield from of_model(model, recipe, fresh=not recipe.train.init_from)


def of_model(model: Any, recipe: Recipe | None, *, fresh: bool) -> Iterator[Finding]:
    """The checks of a model that stands in memory in fp32. Its weights are changed at the end."""
    batch, many = batches(model, recipe)
    ids = random_ids(model, ROWS)
    yield laws.causality(model, ids)
    yield laws.packing(model, ids)
    if fresh:
        yield laws.initial_loss(model, ids)
    yield laws.accumulation(model, batch)
    yield learning.gradient_flow(model, batch)
    used = learning.expert_use(model, many)
    if used is not None:
        yield used
    yield learning.overfit(model, batch)


def of_run(run: Path) -> Iterator[Finding]:
    """The checks of what a run logged and kept; its weights are another matter."""
    rows = read_metrics(run / "metrics.jsonl")
    yield history.losses(rows)
    yield history.throughput(rows)
    used = history.experts(rows)
    if used is not None:
        yield used
    yield history.checkpoints(run)


def batches(model: Any, recipe: Recipe | None) -> tuple[Batch, Tensor]:
    """A small batch to learn, and token ids enough for every expert to be chosen by chance: of the recipe's data where
    it names a store that is there, else random.
    """
    config = model.config
    enough = -(-learning.PER_EXPERT * config.num_experts // (config.num_experts_per_tok * LENGTH))
    rows = max(ROWS, min(enough, MOST_ROWS)) if "sparse" in config.mlp_layer_types else ROWS
    stores = [] if recipe is None else [Path(path) for path in recipe.data.stores()]
    if recipe is not None and stores and (stores[0] / "manifest.json").is_file():
        length = _length(model, recipe.data.seq_len)
        loader = Loader(Store(stores[0]), length, recipe.train.seed, overlong="split")
        found = {key: tensor.to(model.device) for key, tensor in loader.rows(0, rows).items()}
        return {key: tensor[:ROWS] for key, tensor in found.items()}, found["input_ids"]
    ids = random_ids(model, rows)
    return {"input_ids": ids[:ROWS], "labels": ids[:ROWS]}, ids


def random_ids(model: Any, rows: int) -> Tensor:
    """The same random tokens each time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, _length(model, LENGTH)), generator=generator)
    return ids.to(model.device)


def _length(model: Any, wanted: int) -> int:
    return min(wanted, LENGTH, model.config.max_position_embeddings)
