"""How likely the tokens of a prompt are, each after those before it: what `echo` with `logprobs` reports."""

from __future__ import annotations

from typing import Any

import torch

from moai_llm.modeling.model import new_cache

CHUNK = 256  # positions whose logits are in memory at a time

Scored = tuple[float, list[tuple[int, float]]]


@torch.inference_mode()
def prompt_logprobs(text_model: Any, prompt: list[int], top: int) -> list[Scored]:
    """(log-probability, the `top` likeliest tokens with theirs) of each token of a prompt but the first.

    Args:
        text_model: a `TextModel`.
    """
    model: Any = text_model.model
    vocabulary, cache = text_model.tokenizer.vocab_size, new_cache(model.config)
    scored: list[Scored] = []
    for start in range(0, len(prompt) - 1, CHUNK):
        pending = prompt[start : min(start + CHUNK, len(prompt) - 1)]
        logits = model(
            input_ids=torch.tensor([pending], device=model.device), past_key_values=cache, use_cache=True,
            rope_length=len(prompt),
        ).logits[0, :, :vocabulary]  # fmt: skip
        logp = logits.to(torch.float64).log_softmax(-1)
        targets = torch.tensor(prompt[start + 1 : start + 1 + len(pending)], device=logp.device)
        chosen = logp.gather(-1, targets[:, None])[:, 0].tolist()
        best = logp.topk(min(top, vocabulary), -1)
        ids, values = best.indices.tolist(), best.values.tolist()
        scored += [(p, list(zip(i, v))) for p, i, v in zip(chosen, ids, values)]
    return scored
