"""A new token mixer: write the brick, register it, check that it is causal, train it.

A gated moving average: h_t = a h_{t-1} + (1 - a) x_t and y_t = W_o (h_t * silu(W_g x_t)), where each channel learns
its own a. A mixer takes x (B, L, D) to (B, L, D) and must not look ahead, nor across a border of `seq_idx` (B, L).

    python examples/swap_a_brick.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moai_llm import MoaiConfig, MoaiForCausalLM
from moai_llm.modeling.decoder import register_token_mixer
from moai_llm.tokenizer.train import train_tokenizer

TEXT = "Interest is paid on the deposit. 복리는 이자에 이자가 붙는 방식이에요. The bank keeps the deposit. " * 60


class MovingAverage(nn.Module):
    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.decay = nn.Parameter(torch.linspace(-2, 4, width))  # sigmoid: from 0.12 to 0.98 kept at each step
        self.gate, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, *, seq_idx: Tensor | None = None, cache=None, **_) -> Tensor:  # type: ignore[no-untyped-def]
        if cache is not None:
            raise ValueError("this brick keeps no state for generation: call the model with use_cache=False")
        age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])  # (L, L); negative is the future
        keep = torch.sigmoid(self.decay)
        weights = keep ** age.clamp_min(0)[..., None] * (1 - keep) * (age >= 0)[..., None]  # (L, L, D)
        document = torch.zeros_like(x[..., 0]) if seq_idx is None else seq_idx
        same = (document[:, :, None] == document[:, None, :]).to(x.dtype)  # (B, L, L)
        h = torch.einsum("bts,tsd,bsd->btd", same, weights, x)
        return self.out(h * F.silu(self.gate(x)))


@torch.no_grad()
def check(model: MoaiForCausalLM, length: int = 24) -> None:
    """Changing token t changes no logit before t; two documents in a row give what each gives alone."""
    ids = torch.randint(0, 256, (1, length))
    before = model(input_ids=ids, use_cache=False).logits
    for t in range(1, length):
        changed = torch.where(torch.arange(length) == t, 255 - ids, ids)
        after = model(input_ids=changed, use_cache=False).logits
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])
    packed = model(input_ids=ids, seq_idx=(torch.arange(length) >= 10).int()[None], use_cache=False).logits
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in (ids[:, :10], ids[:, 10:])], 1)
    assert torch.allclose(packed, alone, atol=1e-5)
    print("causal, and documents do not leak")


def main() -> None:
    torch.manual_seed(0)
    register_token_mixer("moving_average", MovingAverage)  # from here on a config may name it
    tokenizer = train_tokenizer([TEXT], 320)
    config = MoaiConfig(vocab_size=tokenizer.padded_vocab_size, hidden_size=48, num_hidden_layers=4,
                        layer_types=["moving_average", "full_attention"], intermediate_size=96)  # fmt: skip
    model = MoaiForCausalLM(config)
    check(model.eval())
    batches = torch.tensor(tokenizer.encode(TEXT)[: 3 * 8 * 48]).view(3, 8, 48)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3, fused=True)
    for step in range(24):
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 11, 23):
            print(f"step {step + 1:2}  loss {loss.item():.3f}")
    check(model.eval())


if __name__ == "__main__":
    main()
