"""A conversation: turns, what of them is computed again, a window that moves, answers that are cut short or redone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.inference.chat import Chat
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render
from moai_llm.tokenizer.train import build_tokenizer
from tests.conftest import tiny_model
from tests.tokenizer.conftest import tokenizer_for

TINY = [name for name in recipes.list_recipes() if name.endswith("-tiny")]
GREEDY = Sampling(8, temperature=0)


@pytest.fixture
def chat(tokenizer: Tokenizer) -> Chat:
    model = tiny_model(layer_types=["linear_attention", "full_attention"], vocab_size=512)
    return Chat(TextModel(model, tokenizer, Path("here")), GREEDY)


def computed(chat: Chat) -> int:
    """Prompt tokens that the engine has put through the model so far."""
    counters = chat.session._engine.counters  # type: ignore[union-attr]
    return counters.prompt_tokens - counters.reused_tokens


def test_turns_are_remembered(chat: Chat) -> None:
    first = "".join(chat.say("이자가 뭐예요?"))
    second = "".join(chat.say("and then?"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == first and chat.messages[3]["content"] == second
    fresh = Chat(chat.text_model, chat.sampling)  # the cache changed nothing
    fresh.messages, fresh._said = chat.messages[:2].copy(), {1: chat._said[1]}
    assert "".join(fresh.say("and then?")) == second


@pytest.mark.parametrize("name", TINY)
def test_every_preset_talks_and_computes_only_what_is_new(name: str, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = MoaiForCausalLM(recipes.get_config(name)).eval()
    assert model.config.vocab_size == len(tokenizer)
    chat = Chat(TextModel(model, tokenizer, Path("here")), Sampling(12, seed=3, top_k=0, top_p=1.0))
    said = ["".join(chat.say("What is interest on a deposit?"))]
    before = computed(chat)
    said.append("".join(chat.say("Why?")))
    turn = chat.last
    assert turn is not None and turn.prompt - turn.reused == computed(chat) - before
    new = len(render(tokenizer, [{"role": "user", "content": "Why?"}], add_generation_prompt=True).ids)
    assert chat._said[1][1] and turn.reused > chat.turns[0].prompt
    # the last token of the answer was said and not read, then come the end of its turn and the line end
    assert computed(chat) - before <= new + 3
    chat.session.reset()  # control: without the session all of it is computed
    list(chat.retry())
    assert computed(chat) == turn.prompt > 2 * (new + 3)


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_what_is_taken_back_is_not_computed_again(mixer: str, tokenizer: Tokenizer) -> None:
    chat = Chat(TextModel(tiny_model(mixer, vocab_size=512), tokenizer, Path("here")), Sampling(8, seed=1))
    for question in ("What is interest on a deposit? " * 3, "Why?"):
        list(chat.say(question))
    new = len(render(tokenizer, [{"role": "user", "content": "Why?"}], add_generation_prompt=True).ids) + 3
    for again in (chat.retry, lambda: chat.retry("How?"), lambda: (chat.undo(), chat.say("Who?"))[1]):
        list(again())
        assert chat.last is not None and chat.last.prompt - chat.last.reused <= new < chat.last.prompt // 2
    chat.set_system("Be brief.")  # control
    list(chat.retry())
    assert chat.last is not None and chat.last.prompt - chat.last.reused > new


def test_text_in_other_tokens_is_computed_again(chat: Chat, tokenizer: Tokenizer) -> None:
    """The control of the test above: rendered from the text alone, a drawn answer has other tokens."""
    chat.sampling = Sampling(16, seed=1, top_k=0, top_p=1.0, temperature=1.5)
    list(chat.say("What is interest on a deposit?"))
    kept, prompt = chat._said[1], chat.turns[0].prompt
    assert tokenizer.encode(kept[0]) != kept[1]
    chat._said.clear()
    list(chat.say("Why?"))
    assert chat.last is not None and chat.last.reused == prompt  # a state of Mamba goes on from the end of the prompt


def test_what_the_model_says_becomes_no_control_token(chat: Chat, tokenizer: Tokenizer) -> None:
    list(chat.say("hi"))
    user = tokenizer.special_ids["<|im_start|>"]
    chat._said[1] = chat._said[1][0], [*chat._said[1][1], user]
    first = chat._rendered(chat.messages, 0, 0)
    assert first == render(tokenizer, chat.messages, add_generation_prompt=True).ids
    assert first.count(user) == 3


def test_old_turns_leave_the_context_and_stay_in_the_conversation(chat: Chat) -> None:
    chat.set_system("s")
    for i in range(12):
        list(chat.say(f"question number {i} about interest"))
    assert len(chat.messages) == 25 and 0 < chat.left_out < 24 and chat.left_out % 2 == 0
    assert chat.last is not None and chat.last.prompt <= chat.room == 120
    dropping = [i for i, turn in enumerate(chat.turns) if turn.dropped]
    assert 1 <= len(dropping) < 8 and sum(turn.dropped for turn in chat.turns) == chat.left_out
    ids, left_out = chat._prompt(chat.messages)
    seen = chat.text_model.tokenizer.decode(ids)
    assert "number 11" in seen and "number 0" not in seen and seen.startswith("<|im_start|>system\ns")
    for _ in range(12):
        chat.undo()
    assert chat.messages == [{"role": "system", "content": "s"}] and chat.left_out == 0


def test_a_long_limit_leaves_half_of_the_context_to_the_conversation(chat: Chat) -> None:
    chat.sampling = Sampling(10_000, temperature=0)
    assert chat.room == 64
    answer = chat.say("hello")
    next(answer)
    answer.close()
    assert len(chat.messages) == 2


def test_a_question_that_is_too_long_changes_nothing(chat: Chat) -> None:
    list(chat.say("hi"))
    before = list(chat.messages)
    with pytest.raises(MoaiError, match="the prompt has .* tokens; this model takes 128"):
        list(chat.say("interest " * 200))
    with pytest.raises(MoaiError, match="this model takes 128"):
        list(chat.retry("interest " * 200))
    assert chat.messages == before and len(chat.turns) == 1
    list(chat.say("again"))
    assert len(chat.messages) == 4


def test_an_interrupted_answer_stays_in_the_conversation(chat: Chat) -> None:
    answer = chat.say("hello")
    piece = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece}
    assert chat.last is not None and chat.last.finished == "cancelled"
    list(chat.say("go on"))
    assert chat.last.reused > 0 and len(chat.messages) == 4


def test_cancelled_before_the_first_token(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    list(chat.say("hi"))
    before, engine = list(chat.messages), chat.session._engine
    step = engine.step  # type: ignore[union-attr]
    monkeypatch.setattr(engine, "prefill_chunk", 2)
    monkeypatch.setattr(engine, "step", lambda: (chat.session.cancel(), step())[1])  # while it reads the prompt
    assert "".join(chat.say("hello there")) == "" and chat.messages == before
    assert "".join(chat.retry("hello there")) == "" and chat.messages == before
    monkeypatch.undo()
    fresh = Chat(chat.text_model, GREEDY)
    list(fresh.say("hi"))
    assert "".join(chat.say("hello there")) == "".join(fresh.say("hello there"))  # nothing was torn


def test_another_seed_answers_again(chat: Chat) -> None:
    chat.sampling = Sampling(12, seed=5, top_k=0, top_p=1.0)
    first = "".join(chat.say("hello"))
    second, third = "".join(chat.retry()), "".join(chat.retry())
    assert len({first, second, third}) == 3 and len(chat.messages) == 2
    again = Chat(chat.text_model, Sampling(12, seed=6, top_k=0, top_p=1.0))
    assert "".join(again.say("hello")) == second  # seed + 1
    other = "".join(chat.retry("goodbye"))
    assert chat.messages == [{"role": "user", "content": "goodbye"}, {"role": "assistant", "content": other}]
    assert chat.undo() == "goodbye" and chat.undo() is None and chat.messages == []
    with pytest.raises(MoaiError, match="no question yet"):
        list(chat.retry())


def test_another_system_message_for_the_same_conversation(chat: Chat) -> None:
    list(chat.say("hi"))
    chat.set_system("Be brief.")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.set_system("Be long.")
    assert chat.messages[0]["content"] == "Be long." and len(chat.messages) == 3
    chat.set_system(None)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] and chat.system is None
    chat.put([{"role": "system", "content": ""}, *chat.messages])  # as a file may have it
    chat.set_system("Be brief.")
    assert [m["content"] for m in chat.messages][:2] == ["Be brief.", "hi"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_every_template(name: str) -> None:
    """The prompt is rendered by the template in force, and its end of turn ends the answer."""
    tokenizer = tokenizer_for(name)
    model = tiny_model(vocab_size=512)
    chat = Chat(TextModel(model, tokenizer, Path("here")), Sampling(4, temperature=0), system="Be brief.")
    list(chat.say("hello"))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    end = tokenizer.stop_ids[-1]
    assert tokenizer.decode([end]) == {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}[name]
    fed, real = [], model.forward

    def forward(input_ids: torch.Tensor, **arguments: object):  # type: ignore[no-untyped-def]
        fed.extend(input_ids[0].tolist())
        output = real(input_ids=input_ids, **arguments)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., end] = 9
        return output

    model.forward = forward
    chat.reset()
    chat.session.reset()
    assert "".join(chat.say("hello")) == ""
    assert chat.last is not None and chat.last.finished == "stop" and chat.messages[-1]["content"] == ""
    assert fed == render(tokenizer, chat.messages[:-1], add_generation_prompt=True).ids


def test_a_class_without_slots(tokenizer: Tokenizer) -> None:
    """Other people's classes go through one of transformers' caches: the next turn computes what is new there too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 512, "n_positions": 96, "n_embd": 8, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    chat = Chat(TextModel(model, tokenizer, Path("here")), Sampling(200, temperature=0))
    list(chat.say("hello"))
    assert chat.last is not None and chat.last.finished in ("stop", "length")
    chat.sampling = Sampling(4, temperature=0)
    chat.reset()
    list(chat.say("hello"))
    prompt = chat.last.prompt
    list(chat.say("and?"))
    assert chat.last.reused >= prompt
    fresh = list(Session(chat.text_model).stream(chat._prompt(chat.messages[:3])[0], chat.sampling))
    assert fresh == chat._said[3][1]


def test_a_base_model_cannot_chat() -> None:
    plain = build_tokenizer([], ["<|endoftext|>", "<|pad|>"])
    with pytest.raises(MoaiError, match="not a chat model.*moai generate here.*moai tokenizer template here --set"):
        Chat(TextModel(tiny_model(vocab_size=512), plain, Path("here")), Sampling())
