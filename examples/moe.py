"""Mixture of experts: the router's two losses, and how evenly the experts are used.

Every token goes to 2 of 8 experts. The Switch loss pulls the shares together (1 is perfect balance), the z-loss keeps
the router's logits small. The same model is trained without and with the Switch loss.

    python examples/moe.py
"""

from __future__ import annotations

import itertools

import torch

from moai_llm import MoaiConfig, MoaiForCausalLM
from moai_llm.data.embedded import instructions
from moai_llm.ops.moe import switch_loss
from moai_llm.tokenizer.chat import render
from moai_llm.tokenizer.train import train_tokenizer

STEPS, ROWS, ROW_LENGTH = 40, 8, 64


def make_rows(wanted: int) -> tuple[torch.Tensor, int]:
    """(rows, ROW_LENGTH) ids of conversations one after the other, and the size of the vocabulary."""
    chats = [messages for messages, _ in instructions()]
    tokenizer = train_tokenizer((m["content"] for chat in chats for m in chat), 1024)
    ids = itertools.chain.from_iterable(render(tokenizer, chat).ids for chat in itertools.cycle(chats))
    flat = list(itertools.islice(ids, wanted * ROW_LENGTH))
    mixed = torch.randperm(wanted, generator=torch.Generator().manual_seed(0))  # the languages come in blocks
    return torch.tensor(flat).view(wanted, ROW_LENGTH)[mixed], tokenizer.padded_vocab_size


def train(rows: torch.Tensor, vocab_size: int, balance: float) -> None:
    torch.manual_seed(0)
    config = MoaiConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        mlp_layer_types=["dense", "sparse"],  # the second layer has the experts
        intermediate_size=128, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        router_aux_loss_coef=balance, router_z_loss_coef=0.001, tie_word_embeddings=True,
    )  # fmt: skip
    counts = config.parameters()
    print(f"coefficient {balance}; {counts['total']:,} parameters, of which one token uses {counts['active']:,}")
    model = MoaiForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    for step, batch in enumerate(rows.split(ROWS), 1):
        output = model(input_ids=batch, labels=batch)  # the model shifts the labels
        output.loss.backward()  # next-token loss + coefficient x Switch loss + coefficient x z-loss
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            report(step, output, model.model.take_expert_counts())


def report(step: int, output, used: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """The parts of the loss, and the share of each expert of the sparse layer since the last report."""
    sums = output.router[0]  # one entry for each sparse layer; sums over the counted tokens, so that batches add up
    tokens = sums.probability.sum()
    switch = switch_loss(sums.selected / sums.selected.sum(), sums.probability / tokens)
    shares = used[0] / used[0].sum()
    spread = shares.std(unbiased=False) / shares.mean()
    print(f"  step {step}  next token {output.cross_entropy:.3f}  router {output.aux_loss:.4f}  Switch {switch:.3f}"
          f"  z {sums.z / tokens:.2f}")  # fmt: skip
    print(f"    experts {' '.join(f'{share:4.0%}' for share in shares.tolist())}  spread {spread:.2f}")


def main() -> None:
    rows, vocab_size = make_rows(STEPS * ROWS)
    for balance in (0.0, 0.1):
        train(rows, vocab_size, balance)


if __name__ == "__main__":
    main()
