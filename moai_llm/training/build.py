"""The model of a run and what it is trained for, from its recipe and the tokenizer of its data."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from moai_llm.config import MoaiConfig, read_config
from moai_llm.losses import AnyLoss, ContrastiveLoss, DistillationLoss, Loss, PreferenceLoss, create_loss_function
from moai_llm.modeling.embedding import MoaiForEmbedding, Settings, load_for_vectors
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.training import fp8, lora
from moai_llm.training.contrastive import Contrastive
from moai_llm.training.distillation import Distillation
from moai_llm.training.objective import NextToken, Objective
from moai_llm.training.preference import Preference
from moai_llm.training.quantize import quantize

logger = logging.getLogger("moai_llm")


def build_model(
    recipe: Recipe, tokenizer: Tokenizer, device: torch.device, checkpoint: Path | None = None
) -> MoaiForCausalLM:
    """A fresh model, or the one of `train.init_from`, in fp32 on the device, ready to train.

    A run that goes on from a checkpoint finds its model there, so what `init_from` names may be gone by then; not so
    below adapters (lora.py), which are put on the model of `init_from` again.
    The vocabulary of a fresh model is the tokenizer's, rounded up to a multiple of 128: rows that no token uses would
    only cost memory.

    Raises:
        MoaiError: `init_from` is not a model, or not one for this tokenizer.
    """
    if recipe.train.init_from:
        base = Path(recipe.train.init_from)
        if checkpoint is not None and recipe.lora.rank and not (base / "config.json").is_file():
            raise MoaiError(
                f"the adapters of this run belong on train.init_from {base}, which is not there: put it back, or begin "
                f"a new run with train.init_from={checkpoint}, the sum of both"
            )
        path = base if recipe.lora.rank else checkpoint or base
        model = _load(path, tokenizer, "train.init_from", vectors=_settings(recipe))
    else:
        fields = {name: getattr(recipe.model, name) for name in recipe.model.__dataclass_fields__}
        if fields["vocab_size"] != tokenizer.padded_vocab_size:
            logger.info("vocab_size %s becomes %s, the tokenizer's", fields["vocab_size"], tokenizer.padded_vocab_size)
            fields["vocab_size"] = tokenizer.padded_vocab_size
        settings = _settings(recipe)
        if settings is None:
            model = MoaiForCausalLM(MoaiConfig(**fields))
        else:
            model = MoaiForEmbedding(MoaiConfig(**fields, embedding=settings.to_dict()))  # type: ignore[assignment]
    bos = tokenizer.special_ids.get(tokenizer.roles.get("bos_token", ""), tokenizer.eos_id)
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": bos, "pad_token_id": tokenizer.pad_id}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": tokenizer.stop_ids})
    return prepare_model(model, recipe, device)


def prepare_model(model: MoaiForCausalLM, recipe: Recipe, device: torch.device) -> MoaiForCausalLM:
    """Give a model the recipe's loss, fp32 weights (below adapters perhaps 4 bits) on the device, products in fp8,
    adapters, recomputation and compilation; ready to train.

    Raises:
        MoaiError: rows that are longer than the model's learned positions.
    """
    loss = _loss(recipe)
    if isinstance(loss, Loss):
        model.objective = loss
    _require_positions(model.config, recipe.data.seq_len, "this model")
    if recipe.lora.quantize:
        quantize(model, device, double=recipe.lora.double_quant)
    model.to(device=device, dtype=torch.float32)  # type: ignore[call-arg]
    if recipe.train.precision == "fp8":
        fp8.to_fp8(model)
    if recipe.lora.rank:
        lora.add_adapters(model, recipe.lora, recipe.train.init_from)
    if recipe.train.activation_checkpointing != "none":
        # transformers renamed the method; both turn on `GradientCheckpointingLayer`
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
        for i, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = recipe.train.recomputes(i)
    if recipe.train.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model.train()


def active_parameters(model: MoaiForCausalLM) -> int:
    """What one token passes through; all parameters where a brick from outside cannot be counted."""
    try:
        return model.config.parameters()["active"]
    except ValueError:
        return sum(parameter.numel() for parameter in model.parameters())


def build_objective(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    """What `loss` of the recipe says the run is trained for.

    Raises:
        MoaiError: a parameter out of range, or a teacher that is not a model, or not one for this tokenizer.
    """
    loss = _loss(recipe)
    if isinstance(loss, PreferenceLoss):
        return Preference(loss, recipe, partial(_starting_model, recipe, tokenizer))
    if isinstance(loss, DistillationLoss):
        teacher = Path(recipe.loss.teacher or "")
        _require_tokenizer(teacher, tokenizer, "loss.teacher")
        _require_positions(read_config(teacher / "config.json"), recipe.data.seq_len, "loss.teacher")
        return Distillation(loss, tokenizer.vocab_size, teacher, partial(_load, teacher, tokenizer, "loss.teacher"))
    if isinstance(loss, ContrastiveLoss):
        return Contrastive(loss)
    return NextToken()


def _starting_model(recipe: Recipe, tokenizer: Tokenizer) -> MoaiForCausalLM:
    """What `train.init_from` computes in the precision of the run."""
    model = _load(Path(recipe.train.init_from or ""), tokenizer, "train.init_from")
    return fp8.to_fp8(model) if recipe.train.precision == "fp8" else model


def _loss(recipe: Recipe) -> AnyLoss:
    try:
        return create_loss_function({"type": recipe.loss.type, "params": recipe.loss.params})
    except ValueError as error:
        raise MoaiError(str(error)) from None


def _require_positions(config: MoaiConfig, seq_len: int, name: str) -> None:
    if seq_len > config.max_position_embeddings and config.position_embedding == "learned":
        raise MoaiError(
            f"data.seq_len {seq_len} is more than the {config.max_position_embeddings} learned positions of {name}: "
            "lower data.seq_len or raise model.max_position_embeddings"
        )


def _require_tokenizer(path: Path, tokenizer: Tokenizer, key: str) -> None:
    if not (path / "config.json").is_file():
        raise MoaiError(f"{key}: {path} is not a model directory (no config.json)")
    if load_tokenizer(path).fingerprint != tokenizer.fingerprint:
        raise MoaiError(
            f"the data was prepared with another tokenizer than {path} was trained with: prepare it again with "
            f"--tokenizer {path}"
        )


def _settings(recipe: Recipe) -> Settings | None:
    """Of a model that is trained to make vectors; None for a language model."""
    loss, chosen = _loss(recipe), recipe.embedding
    if not isinstance(loss, ContrastiveLoss):
        return None
    return Settings(
        pooling=chosen.pooling, projection=chosen.projection, normalize=chosen.normalize,
        bidirectional=chosen.bidirectional, dropout=chosen.dropout,
        temperature=loss.temperature if loss.learned_temperature else None,
    )  # fmt: skip


def _load(path: Path, tokenizer: Tokenizer, key: str, vectors: Settings | None = None) -> MoaiForCausalLM:
    _require_tokenizer(path, tokenizer, key)
    if vectors is not None:
        return load_for_vectors(path, vectors)  # type: ignore[return-value]
    return MoaiForCausalLM.from_pretrained(path, dtype=torch.float32)
