"""Beam search: the most likely text that a search over a few running ones finds. Nothing is drawn."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from moai_llm.inference.load import TextModel
from moai_llm.modeling.slots import SlotCache
from moai_llm.runtime import MoaiError


@dataclass(frozen=True)
class Beam:
    """Tokens without the stop token, and the sum of their log probabilities over length ** length_penalty."""

    tokens: list[int]
    score: float
    stopped: bool


@torch.inference_mode()
def beam_search(
    text_model: TextModel, prompt: list[int], beams: int, max_new_tokens: int, length_penalty: float = 1.0
) -> list[Beam]:
    """The best texts found, the best first.

    The rules are those of transformers with `early_stopping=False`: of the 2 x beams best continuations, those that
    end and are among the first `beams` are finished, the others go on; it ends when no running one can become better
    than the worst finished one, at its present length. The length counts the stop token.

    Args:
        length_penalty: above 0 favours long texts, below 0 short ones.

    Raises:
        MoaiError: fewer than one beam, an empty prompt, or no room for an answer.
    """
    model, tokenizer = text_model.model, text_model.tokenizer
    if beams < 1:
        raise MoaiError(f"{beams} beams: at least 1")
    if not prompt:
        raise MoaiError("an empty prompt: give the model something to continue")
    limit = min(max_new_tokens, text_model.context - len(prompt))
    if limit < 1:
        raise MoaiError(f"the prompt has {len(prompt)} tokens; this model takes {text_model.context}")
    stops = set(tokenizer.stop_ids)
    cache = SlotCache(model.config, beams)
    cache.finals = [len(prompt) + limit] * beams
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Beam] = []
    inputs = [prompt]
    for length in range(1, limit + 1):
        output = model(
            input_ids=torch.tensor(inputs, device=model.device),
            past_key_values=cache.select(0, len(inputs)),
            use_cache=True,
            logits_to_keep=1,
        )
        logprobs = output.logits[:, -1, : tokenizer.vocab_size].double().log_softmax(-1)
        totals = logprobs + torch.tensor([[score] for score, _ in running], device=model.device)
        best = totals.flatten().topk(min(2 * beams, totals.numel()))
        going: list[tuple[float, list[int], int]] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            row, token = divmod(place, totals.shape[1])
            tokens = [*running[row][1], token]
            if token in stops or length == limit:
                if rank < beams:
                    stopped = token in stops
                    found = Beam(tokens[:-1] if stopped else tokens, score / length**length_penalty, stopped)
                    finished = heapq.nlargest(beams, [*finished, found], key=lambda beam: beam.score)
            elif len(going) < beams:
                going.append((score, tokens, row))
        if not going:
            break
        if len(finished) == beams and going[0][0] / length**length_penalty <= finished[-1].score:
            break
        if length == 1:
            for row in range(1, len(going)):
                cache.move(0, row)
        else:
            cache.reorder([row for _, _, row in going])
        running = [(score, tokens) for score, tokens, _ in going]
        inputs = [tokens[-1:] for _, tokens in running]
    return finished
