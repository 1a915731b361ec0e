"""Beam search is that of transformers; one beam is greedy."""

from __future__ import annotations

import pytest
import torch

from moai_llm.inference.beams import beam_search
from moai_llm.runtime import MoaiError
from tests.inference.conftest import alone, ids_model

PROMPT, STOPS = [5, 40, 3, 17, 21, 60, 2], [5, 9]


@pytest.mark.parametrize("kind", ["attention", "mamba", "sliding"])
@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (3, 0.0), (5, 2.0), (3, -1.0)])
def test_beams_are_those_of_transformers(kind: str, beams: int, penalty: float) -> None:
    model, ids = ids_model(kind, stops=STOPS), torch.tensor([PROMPT])
    theirs = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, max_new_tokens=9,
        length_penalty=penalty, eos_token_id=STOPS, pad_token_id=0, num_return_sequences=beams,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = beam_search(model, PROMPT, beams, 9, penalty)
    for beam, sequence, score in zip(found, theirs.sequences, theirs.sequences_scores):
        answer = sequence[len(PROMPT) :].tolist()
        end = next((i for i, token in enumerate(answer) if token in STOPS), len(answer))
        assert beam.tokens == answer[:end] and beam.score == pytest.approx(float(score), rel=1e-5)
    assert len(found) == beams


def test_one_beam_is_greedy_and_more_find_what_is_more_likely() -> None:
    model = ids_model()
    assert beam_search(model, PROMPT, 1, 12)[0].tokens == alone(model, PROMPT, 12)
    assert beam_search(model, PROMPT, 8, 12)[0].score > beam_search(model, PROMPT, 1, 12)[0].score


def test_what_cannot_be_searched() -> None:
    model = ids_model()
    with pytest.raises(MoaiError, match="0 beams"):
        beam_search(model, PROMPT, 0, 5)
    with pytest.raises(MoaiError, match="empty prompt"):
        beam_search(model, [], 2, 5)
    with pytest.raises(MoaiError, match="this model takes 128"):
        beam_search(model, [1] * 128, 2, 5)
