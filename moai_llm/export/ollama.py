"""An Ollama Modelfile for a GGUF file. Ollama's templates are Go's, so those we know are written in that language;
for any other Ollama looks at the Jinja template inside the file.
"""

from __future__ import annotations

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import template_name
from moai_llm.tokenizer.templates import TEMPLATES, Template


def modelfile(tokenizer: Tokenizer, file: str, context: int) -> str:
    """The text of a Modelfile beside `file`."""
    lines = [f"FROM ./{file}", ""]
    try:
        known = TEMPLATES.get(template_name(tokenizer))
    except MoaiError:
        lines += ["# a model for plain text: it has no chat template", 'TEMPLATE """{{ .Prompt }}"""']
    else:
        if known is None:
            lines.append("# the chat template is one of its own: Ollama reads it from the file, where it knows it")
        else:
            lines.append(f'TEMPLATE """{go_template(known)}"""')
    names = {i: name for name, i in tokenizer.special_ids.items()}
    lines += ["", *(f'PARAMETER stop "{names[i]}"' for i in tokenizer.stop_ids if i in names)]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])


def go_template(template: Template) -> str:
    """A conversation as the template writes it, up to the answer, in Go's template language. Without tools, and without
    dropping white space around a text, which Go has no function for.
    """

    def opening(role: str) -> str:
        return template.header.format(role=template.names.get(role, role))

    closing = template.end + template.after
    if template.system_turn:
        turns = template.header.format(role="{{ .Role }}") + "{{ .Content }}" + closing
        return template.begin + "{{ range .Messages }}" + turns + "{{ end }}" + opening("assistant")
    front = '{{ if $front }}{{ $front }}\n\n{{ end }}{{ $front = "" }}'
    turns = (
        '{{ if eq .Role "user" }}' + opening("user") + front + "{{ .Content }}" + closing
        + '{{ else if eq .Role "assistant" }}' + opening("assistant") + "{{ .Content }}" + closing + "{{ end }}"
    )  # fmt: skip
    begin = template.begin + "{{ $front := .System }}{{ range .Messages }}"
    return begin + turns + "{{ end }}" + opening("assistant")
