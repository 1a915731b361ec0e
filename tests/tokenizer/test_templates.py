"""The templates we know: the same ids and mask as transformers gives by the Jinja that is saved, and the forms that are
published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.chat import render, set_template, template_name
from moai_llm.tokenizer.custom import CustomTemplate
from moai_llm.tokenizer.encoder import Encoder
from moai_llm.tokenizer.templates import TEMPLATES
from moai_llm.tokenizer.turns import TurnEncoder
from tests.tokenizer.conversations import ATTACKS, TOOLS, conversation

every_template = pytest.mark.parametrize("name", TEMPLATES)
Make = Callable[[str], Tokenizer]
TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": " Hi \n"},
    {"role": "assistant", "content": "\tHello."},
    {"role": "user", "content": "이자?"},
    {"role": "assistant", "content": "값"},
]
CALL = [
    {"role": "user", "content": "Rates?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "rate", "arguments": {"bank": "우리"}}]},
    {"role": "tool", "content": '{"rate": 3}'},
    {"role": "assistant", "content": "3%"},
]


def shape(name: str) -> dict[str, Any]:
    return {"tools": name != "gemma", "calls": 1 if name == "llama3" else 2}


@every_template
def test_transformers_gives_the_same_ids_and_mask(name: str, make: Make, tmp_path: Path) -> None:
    tokenizer = make(name)
    theirs = AutoTokenizer.from_pretrained(tokenizer.save(tmp_path))
    shared_tokens = 0
    for seed in range(150):
        messages, tools = conversation(seed, **shape(name))
        encoded = theirs.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        rendered = render(tokenizer, messages, tools=tools)
        assert rendered.ids == encoded["input_ids"], messages
        assert rendered.learn == [bool(m) for m in encoded["assistant_masks"]], messages
        prompt = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
        assert prompt == render(tokenizer, messages, tools=tools, add_generation_prompt=True).ids
        shared_tokens += any(str(m["content"]).startswith("\n") for m in messages if m["role"] == "assistant")
    assert shared_tokens > 5  # the hard ones were there


@every_template
def test_our_two_paths_agree(name: str, make: Make) -> None:
    """The turns that are placed by id, and the sandboxed Jinja: texts with control strings too."""
    tokenizer = make(name)
    reference = CustomTemplate(tokenizer.backend, tokenizer.roles, TEMPLATES[name].jinja)
    for seed in range(60):
        messages, tools = conversation(seed, **shape(name))
        if seed % 2:
            messages[-2]["content"] += ATTACKS[seed // 2 % len(ATTACKS)]
            messages[0]["content"] = ATTACKS[seed // 3 % len(ATTACKS)] + messages[0]["content"]
        for prompt in (False, True):
            rendered = render(tokenizer, messages, tools=tools, add_generation_prompt=prompt)
            assert tuple(rendered) == reference.render(messages, tools, prompt), messages


PUBLISHED = {
    "chatml": "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n"
    "\tHello.<|im_end|>\n<|im_start|>user\n이자?<|im_end|>\n<|im_start|>assistant\n값<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n이자?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n값"
    "<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\n Be brief. \n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    "<start_of_turn>user\n이자?<end_of_turn>\n<start_of_turn>model\n값<end_of_turn>\n",
}
LEARNED = {
    "chatml": "\tHello.<|im_end|>값<|im_end|>",
    "llama3": "Hello.<|eot_id|>값<|eot_id|>",
    "gemma": "Hello.<end_of_turn>값<end_of_turn>",
}


@every_template
def test_the_published_form(name: str, make: Make) -> None:
    tokenizer = make(name)
    rendered = render(tokenizer, TALK)
    assert tokenizer.decode(rendered.ids) == PUBLISHED[name]
    assert tokenizer.decode([i for i, learn in zip(*rendered) if learn]) == LEARNED[name]
    header = {"gemma": "<start_of_turn>model\n", "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
    prompt = tokenizer.decode(render(tokenizer, TALK[:2], add_generation_prompt=True).ids)
    assert prompt.endswith(header.get(name, "<|im_start|>assistant\n")) and PUBLISHED[name].startswith(prompt)


@every_template
def test_no_system_message_is_made_up_and_bos_stands_once(name: str, make: Make) -> None:
    tokenizer = make(name)
    text = tokenizer.decode(render(tokenizer, TALK[1:3]).ids)
    assert "system" not in text and "Cutting" not in text and "helpful" not in text
    begin = TEMPLATES[name].begin
    assert text.count(begin) == 1 if begin else "bos" not in text
    assert tokenizer.roles["bos_token"] == (begin or "<|endoftext|>")


def test_tools_in_chatml(make: Make) -> None:
    tokenizer = make("chatml")
    rendered = render(tokenizer, CALL, tools=TOOLS)
    text = tokenizer.decode(rendered.ids)
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in TOOLS)
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call") and f"<tools>\n{tools}\n</tools>" in text
    learned = tokenizer.decode([i for i, learn in zip(*rendered) if learn])
    assert learned == (
        '<tool_call>\n{"name": "rate", "arguments": {"bank": "우리"}}\n</tool_call><|im_end|>3%<|im_end|>'
    )
    assert '<|im_start|>user\n<tool_response>\n{"rate": 3}\n</tool_response><|im_end|>' in text
    with_system = tokenizer.decode(render(tokenizer, [TALK[0], *CALL], tools=TOOLS).ids)
    assert with_system.startswith("<|im_start|>system\n Be brief. \n\n# Tools\n") and with_system.count("system") == 1
    two = [CALL[0], {**CALL[1], "content": "Wait.", "tool_calls": CALL[1]["tool_calls"] * 2}, CALL[2], CALL[2]]
    text = tokenizer.decode(render(tokenizer, two).ids)
    assert "Wait.\n<tool_call>\n" in text and text.count("<tool_call>") == 2
    assert text.count("<|im_start|>user") == 2 and "</tool_response>\n<tool_response>" in text


def test_tools_in_llama3(make: Make) -> None:
    tokenizer = make("llama3")
    rendered = render(tokenizer, [TALK[0], *CALL], tools=TOOLS)
    text = tokenizer.decode(rendered.ids)
    assert "<|end_header_id|>\n\nGiven the following functions, please respond with a JSON" in text
    assert json.dumps(TOOLS[0], indent=4, ensure_ascii=False) + "\n\n" in text and "\n\nRates?<|eot_id|>" in text
    assert '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"rate\\": 3}"<|eot_id|>' in text
    learned = tokenizer.decode([i for i, learn in zip(*rendered) if learn])
    assert learned == '{"name": "rate", "parameters": {"bank": "우리"}}<|eot_id|>3%<|eot_id|>'
    twice = {**CALL[1], "tool_calls": CALL[1]["tool_calls"] * 2}
    with pytest.raises(MoaiError, match="one tool call in a turn"):
        render(tokenizer, [CALL[0], twice])
    with pytest.raises(MoaiError, match="into the first user turn, and there is none"):
        render(tokenizer, [CALL[3]], tools=TOOLS)


def test_gemma_has_no_form_for_tools(make: Make) -> None:
    tokenizer = make("gemma")
    for messages, tools in ((TALK, TOOLS), (CALL[:2], None), (CALL[2:], None)):
        with pytest.raises(MoaiError, match="gemma template has no form for tools; chatml and llama3 have"):
            render(tokenizer, messages, tools=tools)
    for messages in (TALK[:1], [TALK[0], TALK[2]], [*TALK, TALK[0], TALK[1]]):
        with pytest.raises(MoaiError, match="a system message only in front of a first user turn"):
            render(tokenizer, messages)


@every_template
@pytest.mark.parametrize("attack", ATTACKS)
def test_control_strings_stay_text_here_and_not_in_transformers(
    name: str, attack: str, make: Make, tmp_path: Path
) -> None:
    tokenizer = make(name)
    template = TEMPLATES[name]
    control = {tokenizer.special_ids[token] for token in template.tokens}
    calm = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    evil = [{"role": "user", "content": f"x{attack}"}, {"role": "assistant", "content": f"y{attack}"}]

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in set(tokenizer.special_ids.values())]

    rendered = render(tokenizer, evil)
    assert controls(rendered.ids) == controls(render(tokenizer, calm).ids) and control >= set(controls(rendered.ids))
    assert tokenizer.decode([i for i, learn in zip(*rendered) if learn]) == f"y{attack}{template.end}"
    theirs = AutoTokenizer.from_pretrained(tokenizer.save(tmp_path))
    if any(token in attack for token in tokenizer.special_ids):  # the control: transformers reads them
        assert len(controls(theirs.apply_chat_template(evil)["input_ids"])) > len(controls(rendered.ids))
    assert tokenizer.decode(rendered.ids) == theirs.apply_chat_template(evil, tokenize=False)


@every_template
def test_a_saved_template_is_known_again(name: str, make: Make, tmp_path: Path) -> None:
    tokenizer = make(name)
    again = load_tokenizer(tokenizer.save(tmp_path))
    assert template_name(again) == name and again.stop_ids == tokenizer.stop_ids
    assert render(again, TALK) == render(tokenizer, TALK)
    again.chat_template += "{{- ' ' }}"  # somebody changed it: then it is theirs
    assert template_name(again) == "custom" and render(again, TALK).ids != render(tokenizer, TALK).ids
    again.chat_template = None  # the control tokens alone say which
    assert template_name(again) == name
    set_template(again, name)
    assert render(again, TALK) == render(tokenizer, TALK)


def test_an_answer_that_shares_a_token_with_its_header(make: Make) -> None:
    """The token is learned, as in transformers. Tokens that are bytes are counted; others are asked for their place."""
    tokenizer = make("chatml")
    bound = TurnEncoder(tokenizer, TEMPLATES["chatml"])
    opening, text = bound._opening("assistant"), "\n\nanswer"
    run = tokenizer.encode(opening.lead + text)
    assert run[: len(opening.lead_ids)] != opening.lead_ids  # the control: it does share one
    places = Encoder(tokenizer.backend).plain.encode(opening.lead + text).offsets
    first = next(i for i, (_, end) in enumerate(places) if end > len(opening.lead))
    assert bound._said_from(run, opening, text) == first == len(opening.lead_ids) - 1
    bound._tokenizer = SimpleNamespace(token_bytes=lambda i: b"", backend=tokenizer.backend)
    assert bound._said_from(run, opening, text) == first


@every_template
def test_text_that_is_not_unicode(name: str, make: Make) -> None:
    """A lone surrogate, which JSON can carry, becomes U+FFFD by both paths."""
    tokenizer = make(name)
    messages = [{"role": "user", "content": "a\ud800<bos>"}, {"role": "assistant", "content": "\n\udfff 이"}]
    rendered = render(tokenizer, messages)
    assert tokenizer.decode([i for i, learn in zip(*rendered) if learn]).count("\ufffd") == 1
    assert tuple(rendered) == CustomTemplate(tokenizer.backend, {}, TEMPLATES[name].jinja).render(messages, None, False)
