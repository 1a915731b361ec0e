"""The model of a run, from its recipe and the tokenizer of its data."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import GenerationConfig

from moai_llm.config import MoaiConfig
from moai_llm.losses import create_loss_function
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("moai_llm")


def build_model(
    recipe: Recipe, tokenizer: Tokenizer, device: torch.device, checkpoint: Path | None = None
) -> MoaiForCausalLM:
    """A fresh model, or the one of `train.init_from`, in fp32 on the device, ready to train.

    A run that goes on from a checkpoint finds its model there, so what `init_from` names may be gone by then.
    The vocabulary of a fresh model is the tokenizer's, rounded up to a multiple of 128: rows that no token uses would
    only cost memory.

    Raises:
        MoaiError: `init_from` is not a model, or not one for this tokenizer.
    """
    if recipe.train.init_from:
        model = _load(checkpoint or Path(recipe.train.init_from), tokenizer)
    else:
        fields = {name: getattr(recipe.model, name) for name in recipe.model.__dataclass_fields__}
        if fields["vocab_size"] != tokenizer.padded_vocab_size:
            logger.info("vocab_size %s becomes %s, the tokenizer's", fields["vocab_size"], tokenizer.padded_vocab_size)
            fields["vocab_size"] = tokenizer.padded_vocab_size
        model = MoaiForCausalLM(MoaiConfig(**fields))
    bos = tokenizer.special_ids.get(tokenizer.roles.get("bos_token", ""), tokenizer.eos_id)
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": bos, "pad_token_id": tokenizer.pad_id}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": tokenizer.stop_ids})
    return prepare_model(model, recipe, device)


def prepare_model(model: MoaiForCausalLM, recipe: Recipe, device: torch.device) -> MoaiForCausalLM:
    """Give a model the recipe's loss, fp32 weights on the device, recomputation and compilation; ready to train.

    Raises:
        MoaiError: rows that are longer than the model's learned positions.
    """
    try:
        model.objective = create_loss_function({"type": recipe.loss.type, "params": recipe.loss.params})
    except ValueError as error:
        raise MoaiError(str(error)) from None
    if recipe.data.seq_len > model.config.max_position_embeddings and model.config.position_embedding == "learned":
        raise MoaiError(
            f"data.seq_len {recipe.data.seq_len} is more than the {model.config.max_position_embeddings} learned "
            "positions of this model: lower data.seq_len or raise model.max_position_embeddings"
        )
    model.to(device=device, dtype=torch.float32)  # type: ignore[call-arg]
    if recipe.train.activation_checkpointing:
        # transformers renamed the method; both turn on `GradientCheckpointingLayer`
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    if recipe.train.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model.train()


def _load(path: Path, tokenizer: Tokenizer) -> MoaiForCausalLM:
    if not (path / "config.json").is_file():
        raise MoaiError(f"train.init_from: {path} is not a model directory (no config.json)")
    theirs = load_tokenizer(path)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise MoaiError(
            f"the data was prepared with another tokenizer than {path} was trained with: prepare it again with "
            f"--tokenizer {path}"
        )
    return MoaiForCausalLM.from_pretrained(path, dtype=torch.float32)
