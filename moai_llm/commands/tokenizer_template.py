"""`moai tokenizer template`: see a conversation as the model sees it, and choose the chat template."""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import Any

from rich.text import Text

from moai_llm.runtime import MoaiError, make_console

SAMPLE = [
    {"role": "user", "content": "What is 12 x 12?"},
    {"role": "assistant", "content": "144"},
    {"role": "user", "content": "글자로는요?"},
    {"role": "assistant", "content": "백사십사"},
]
CONTROL, LEARNED = "bold cyan", "green"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", help="a tokenizer or model directory")
    parser.add_argument("--set", metavar="NAME", help="put chatml, llama3, gemma or a Jinja file in force there")
    parser.add_argument("--messages", metavar="FILE", help="show the first conversation of a file, not a small sample")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.sft import Messages, read_conversations
    from moai_llm.data.sources import read_records
    from moai_llm.tokenizer import load_tokenizer
    from moai_llm.tokenizer.chat import render, save_template, set_template, template_name, turn_ends

    tokenizer = load_tokenizer(arguments.tokenizer)
    messages = Messages(SAMPLE)
    if arguments.messages:
        found = next(iter(read_conversations(read_records([arguments.messages]))), None)
        if found is None:
            raise MoaiError(f"{arguments.messages} holds no conversation")
        messages = found[0]
    console = make_console()
    if arguments.set:
        set_template(tokenizer, arguments.set)
    rendered = render(tokenizer, messages, tools=messages.tools)
    console.print(_shown(tokenizer, rendered.ids, rendered.learn, marks=not console.is_terminal), soft_wrap=True)
    names = {i: token for token, i in tokenizer.special_ids.items()}
    ends = " ".join(names.get(i, str(i)) for i in turn_ends(tokenizer)) or "nothing"
    console.print(
        f"{template_name(tokenizer)}: {len(rendered.ids)} tokens, {sum(rendered.learn)} learned "
        f"({LEARNED if console.is_terminal else 'in ⟦ ⟧'}); an answer ends with {ends}",
        markup=False,
    )
    if arguments.set:  # a template that fails on the conversation is not written
        console.print(f"written to {save_template(tokenizer, arguments.tokenizer)}", markup=False)


def _shown(tokenizer: Any, ids: list[int], learn: list[bool], marks: bool) -> Text:
    """The conversation with control tokens and what is learned in colours, or in marks."""
    control = set(tokenizer.special_ids.values())
    text = Text()
    for wanted, said in groupby(zip(ids, learn), key=lambda token: token[1]):
        text.append("⟦" if wanted and marks else "")
        for special, run in groupby((i for i, _ in said), key=lambda i: i in control):
            style = " ".join(name for name, on in ((CONTROL, special), (LEARNED, wanted and not special)) if on)
            text.append(tokenizer.decode(run), style=style + (" underline" if wanted and special else ""))
        text.append("⟧" if wanted and marks else "")
    return text
