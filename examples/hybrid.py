"""A hybrid of Mamba and attention, built in Python and trained in a plain loop.

What the recipe and `moai train` do for you, by hand: a tokenizer, packed rows, a model, an optimizer, generation.
Documents share rows here and never see each other: the batch says where each begins (`seq_idx`, `position_ids`).

    python examples/hybrid.py
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import torch

from moai_llm import MoaiConfig, MoaiForCausalLM
from moai_llm.data.embedded import library_texts
from moai_llm.data.loader import Loader
from moai_llm.data.prepare import prepare_texts
from moai_llm.data.shards import Store
from moai_llm.inference import TextModel, sample_text
from moai_llm.tokenizer.train import train_tokenizer

STEPS, ROWS, ROW_LENGTH = 30, 8, 128


def make_loader(folder: Path) -> Loader:
    """Text of the language reference -> tokenizer -> store -> packed rows, ordered by the seed alone."""
    texts = list(islice(library_texts(), 60))
    tokenizer = train_tokenizer((text for text, _ in texts), 1024)
    prepare_texts(texts, tokenizer, folder / "store", sources=["the language reference"])
    return Loader(Store(folder / "store"), ROW_LENGTH, seed=0)


def make_model(vocab_size: int) -> MoaiForCausalLM:
    """Three Mamba layers to one of attention. The short lists are tiled over the depth."""
    config = MoaiConfig(
        vocab_size=vocab_size, hidden_size=96, num_hidden_layers=4, intermediate_size=192,
        layer_types=["mamba", "mamba", "mamba", "attention"], mlp_layer_types=["dense"],
        num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        position_embedding="none",  # the Mamba layers know the order, so attention needs no positions
        tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    counts = config.parameters()
    print(f"{counts['total']:,} parameters, layers: {', '.join(config.layer_types or [])}")
    return MoaiForCausalLM(config)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        loader = make_loader(Path(folder))
        tokenizer = loader.sources[0].store.tokenizer()
        print(f"{len(loader)} rows of {ROW_LENGTH} tokens, {loader.packing.efficiency:.1%} full")
        model = make_model(tokenizer.padded_vocab_size).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1, fused=True)
        for step in range(STEPS):
            batch = loader.rows(step * ROWS, ROWS)  # input_ids, labels, position_ids, seq_idx
            loss = model(**batch).loss  # the loss comes from hidden states; while training there are no logits
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step == STEPS - 1:
                print(f"step {step + 1:3}  loss {loss.item():.3f}")
    ready = TextModel(model.eval(), tokenizer, Path("hybrid"))
    print(sample_text(ready, "The statement", max_length=30, temperature=0.7, seed=0))


if __name__ == "__main__":
    main()
