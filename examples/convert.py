"""Models of transformers to ours and back, with the same logits.

Three tiny models with random weights, one for each kind of decoder: attention (Qwen3), Mamba, and both with experts
(Jamba). A model that no transformers class computes is refused, with the reason for each class.

    python examples/convert.py
"""

from __future__ import annotations

import torch
from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from moai_llm import MoaiConfig
from moai_llm.modeling.convert import from_native, native_family, to_native

SIZE = {"vocab_size": 128, "hidden_size": 32, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def natives() -> dict[str, torch.nn.Module]:
    """name -> a model of transformers; our weights go by other names, the functions are the same."""
    jamba = JambaConfig(
        **SIZE, **HEADS, num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=3, num_experts=4,
        expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    return {
        "Qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZE, **HEADS, num_hidden_layers=2, head_dim=16)),
        "Mamba": MambaForCausalLM(MambaConfig(**SIZE, num_hidden_layers=2)),
        "Jamba": JambaForCausalLM(jamba),
    }


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()  # transformers' Mamba would like packages that it does not need here
    torch.manual_seed(0)
    ids = torch.randint(1, SIZE["vocab_size"], (2, 24))
    for name, native in natives().items():
        native = native.eval()
        ours = from_native(native)
        back = to_native(ours)
        wanted, got, returned = (model(input_ids=ids).logits for model in (native, ours, back))
        there, again = (wanted - got).abs().max().item(), (wanted - returned).abs().max().item()
        layers = ", ".join(f"{m}+{c}" for m, c in zip(ours.config.layer_types, ours.config.mlp_layer_types))
        print(f"{name}: {layers}\n  there {there:.1e}, and back as {type(back).__name__} {again:.1e}")
        assert there < 1e-5 and again == 0  # fp32 sums in another order there; back it is the same code
        assert all(torch.equal(a, b) for a, b in zip(native.state_dict().values(), back.state_dict().values()))
    print("all weights came back bit for bit")

    learned = MoaiConfig(vocab_size=128, hidden_size=32, num_attention_heads=4, position_embedding="learned")
    try:
        native_family(learned)
    except ValueError as refusal:
        print(f"and what has no counterpart is refused: {refusal}")


if __name__ == "__main__":
    main()
