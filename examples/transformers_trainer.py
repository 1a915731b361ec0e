"""Our model under transformers' own Trainer: it is a transformers model, so nothing has to be adapted.

transformers' Trainer needs the package `accelerate`, which MOAI-LLM itself does not; without it this example says so
and stops. `moai train` is the other way: packed rows, exact resume and no further package.

    pip install accelerate
    python examples/transformers_trainer.py
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moai_llm import MoaiConfig, MoaiForCausalLM
from moai_llm.data.embedded import instructions
from moai_llm.tokenizer.chat import render
from moai_llm.tokenizer.train import train_tokenizer

STEPS, ROW_LENGTH = 30, 64


def make_dataset() -> tuple[list[dict[str, list[int]]], int]:
    """One conversation a row, padded; labels are -100 wherever the assistant does not speak."""
    chats = [messages for messages, _ in instructions()]
    tokenizer = train_tokenizer((m["content"] for chat in chats for m in chat), 1024)
    rows = []
    for chat in chats:
        ids, learn = (column[:ROW_LENGTH] for column in render(tokenizer, chat))
        padding = ROW_LENGTH - len(ids)
        labels = [token if wanted else -100 for token, wanted in zip(ids, learn)]
        rows.append({
            "input_ids": ids + [tokenizer.pad_id] * padding, "labels": labels + [-100] * padding,
            "attention_mask": [1] * len(ids) + [0] * padding,
        })  # fmt: skip
    kept = [row for row in rows if set(row["labels"]) != {-100}]
    return kept, tokenizer.padded_vocab_size


def main() -> None:
    if find_spec("accelerate") is None:
        sys.exit("transformers' Trainer needs accelerate, which is not installed: pip install accelerate")
    torch.manual_seed(0)
    rows, vocab_size = make_dataset()
    config = MoaiConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["mamba", "attention"], intermediate_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = MoaiForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=10,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("loss " + " ".join(f"{float(loss):.3f}" for loss in losses))
        trainer.save_model(folder)  # a directory like any other: config.json and model.safetensors
        again = AutoModelForCausalLM.from_pretrained(folder)
        print(f"saved and loaded as {type(again).__name__}, {again.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
