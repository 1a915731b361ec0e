"""Tokenizers for llama.cpp: the rule that splits, the kinds of tokens, and the chat templates of GGUF and Ollama."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, normalizers

from moai_llm.data.embedded import sample_texts
from moai_llm.export.ollama import go_template, modelfile
from moai_llm.export.vocabulary import QWEN2_SPLIT, RULES, Kind, as_read, disagreements, vocabulary
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import build_bpe
from moai_llm.tokenizer.chat import render, set_template
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT, O200K_SPLIT
from moai_llm.tokenizer.templates import TEMPLATES
from moai_llm.tokenizer.train import train_tokenizer
from tests.export.conftest import split_by
from tests.tokenizer.foreign import unigram

TEXTS = [text for documents in sample_texts().values() for text in documents]
HARD = [
    "ÉCOLE приветМир", "e\u0301te\u0301", "❤️❤️", "नमस्ते", "가나다\u1112\u1161\u11ab", "か\u3099", "don't I'LL WE'VE",
    "  a\n\n\tb ", "\u3000全角", "\x00\x01", "1,234,567", "x==y!=z", "🚀👩‍👩‍👧", "\r\n\u2028\u0085",
]  # fmt: skip


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, QWEN2_SPLIT, CL100K_SPLIT, O200K_SPLIT])
def test_what_a_file_holds_gives_the_same_ids(pattern: str, tokenizer: Tokenizer) -> None:
    ours = split_by(pattern, tokenizer)
    found = vocabulary(ours)
    assert found.rule is RULES[pattern][0] and len(found.tokens) == ours.vocab_size
    read = as_read(found.rule, found.tokens, found.kinds, found.merges)
    assert disagreements(read, ours, TEXTS + HARD) == (len(TEXTS + HARD), [])
    broken = as_read(found.rule, found.tokens, found.kinds, found.merges[::-1])  # control
    assert disagreements(broken, ours, TEXTS)[1]


def test_where_a_rule_is_only_close_it_is_said_and_shown() -> None:
    text = ["नमस्ते दुनिया", "CaféBar caféBar приветМир", "ÉCOLE école"] * 50
    ours = train_tokenizer(text, 400, fewer=True)
    close, older = (vocabulary(ours, name) for name in ("granite-embed-multi-97m", "gpt-4o"))
    assert "no case there" in close.notes[0] and "combining marks" in older.notes[0]
    reads = [as_read(found.rule, found.tokens, found.kinds, found.merges) for found in (close, older)]
    wrong = [disagreements(read, ours, dict.fromkeys(text))[1] for read in reads]
    assert text[0] not in wrong[0] and text[0] in wrong[1]
    assert wrong[0] == [text[2]]
    assert not vocabulary(split_by(CL100K_SPLIT, ours)).notes
    with pytest.raises(MoaiError, match="rules for this tokenizer are granite-embed-multi-97m, gpt-4o, not 'qwen2'"):
        vocabulary(ours, "qwen2")


def test_kinds_and_holes(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken("<tool>", special=False)])
    ours = Tokenizer(backend, tokenizer.roles, tokenizer.chat_template)
    found = vocabulary(ours)
    kinds = dict(zip(found.tokens, found.kinds))
    assert kinds["<tool>"] == Kind.USER_DEFINED and kinds["<|im_end|>"] == Kind.CONTROL and kinds["a"] == Kind.NORMAL
    texts = ["use <tool> now", "<|im_end|> is no control token in a text"]
    assert not disagreements(as_read(found.rule, found.tokens, found.kinds, found.merges), ours, texts)[1]
    assert found.ids == {"eos": ours.eos_id, "bos": ours.special_ids[ours.roles["bos_token"]], "padding": ours.pad_id,
                         "eot": ours.special_ids["<|im_end|>"]}  # fmt: skip


def test_tokens_that_merges_do_not_make_decide_the_rule(tokenizer: Tokenizer) -> None:
    """`zq` is a token, and no merge makes it: only a rule that takes whole pieces would find it."""
    vocab, merges = tokenizer.backend.get_vocab(with_added_tokens=False), vocabulary(tokenizer).merges
    assert "zq" not in vocab
    vocab["zq"] = max(vocab.values()) + 1
    for pattern, whole in ((CL100K_SPLIT, "llama-bpe"), (O200K_SPLIT, "granite-embed-multi-97m")):
        for ignore, rule in ((True, whole), (False, {"llama-bpe": "dbrx"}.get(whole, "gpt-4o"))):
            backend = build_bpe(vocab, [tuple(merge.split(" ")) for merge in merges], pattern)  # type: ignore[misc]
            backend.model = tokenizers.models.BPE(vocab, [tuple(m.split(" ")) for m in merges], ignore_merges=ignore)  # type: ignore[misc]
            backend.add_special_tokens(tokenizer.special_tokens)
            ours = Tokenizer(backend, tokenizer.roles, None)
            found = vocabulary(ours)
            assert found.rule.name == rule
            read = as_read(found.rule, found.tokens, found.kinds, found.merges)
            assert not disagreements(read, ours, ["zq", "a zq b"])[1]
            assert (ours.encode("zq") == [vocab["zq"]]) == ignore
    backend = build_bpe(vocab, [tuple(merge.split(" ")) for merge in merges], GPT2_SPLIT)  # type: ignore[misc]
    backend.model = tokenizers.models.BPE(vocab, [tuple(m.split(" ")) for m in merges], ignore_merges=True)  # type: ignore[misc]
    with pytest.raises(MoaiError, match="no rule of llama.cpp for its split treats those alike"):
        vocabulary(Tokenizer(backend, tokenizer.roles, None))


def test_other_tokenizers_are_refused_or_noted(tokenizer: Tokenizer) -> None:
    with pytest.raises(MoaiError, match="Unigram"):
        vocabulary(Tokenizer(unigram(), {}, None))
    with pytest.raises(MoaiError, match="knows splits of text by name"):
        vocabulary(split_by(r"\p{L}+|\P{L}+", tokenizer))
    with pytest.raises(MoaiError, match="changes text before it cuts it .NFKC"):
        vocabulary(split_by(O200K_SPLIT, tokenizer, normalizer=normalizers.NFKC()))
    assert "composes text first" in vocabulary(split_by(O200K_SPLIT, tokenizer, normalizer=normalizers.NFC())).notes[0]


# ---------------------------------------------------------------- chat templates

TALKS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "이자가 뭐예요?"}],
    [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"},
     {"role": "user", "content": "d {{ x }}"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
     {"role": "user", "content": "3"}],
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_templates_in_a_file_and_in_a_modelfile_write_what_ours_writes(name: str, talk: list[dict[str, str]]) -> None:
    tokens = [*TEMPLATES[name].tokens, "<|endoftext|>", "<|pad|>"]
    ours = train_tokenizer(TEXTS[:4], 300, fewer=True, special_tokens=tokens)
    set_template(ours, name)
    expected = ours.decode(render(ours, talk, add_generation_prompt=True).ids)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    in_file = vocabulary(ours).chat_template
    assert in_file is not None
    written = environment.from_string(in_file).render(messages=talk, add_generation_prompt=True, bos_token="<|begin|>")
    assert written == expected
    assert go(go_template(TEMPLATES[name]), talk) == expected
    text = modelfile(ours, "model.gguf", 512)
    assert f'TEMPLATE """{go_template(TEMPLATES[name])}"""' in text and text.startswith("FROM ./model.gguf\n")
    assert [line for line in text.splitlines() if "stop" in line] == [
        f'PARAMETER stop "{token}"' for token in ("<|endoftext|>", TEMPLATES[name].end)
    ]


def test_a_modelfile_without_a_template_we_know(tokenizer: Tokenizer) -> None:
    own = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    assert "TEMPLATE" not in modelfile(Tokenizer(tokenizer.backend, tokenizer.roles, own), "m.gguf", 64)
    plain = train_tokenizer(TEXTS[:4], 300, fewer=True, special_tokens=["<|endoftext|>", "<|pad|>"])
    plain.chat_template = None
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(plain, "m.gguf", 64)


def go(template: str, messages: list[dict[str, str]]) -> str:
    """As much of Go's text/template as ours are written in: range, if, else, eq, fields and variables."""
    steps = re.split(r"\{\{ (.*?) \}\}", template)  # text and actions in turn
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    variables: dict[str, str] = {}

    def value(word: str, dot: dict[str, str]) -> str:
        if word.startswith('"'):
            return word.strip('"')
        return variables[word] if word.startswith("$") else dot[word[1:]]

    def block(at: int) -> Iterator[tuple[int, str]]:
        """The `else` and `end` that belong to the action at `at`."""
        depth = 0
        for i in range(at + 1, len(steps)):
            action = steps[i] if i % 2 else ""
            if action.startswith(("if ", "range ")):
                depth += 1
            elif action == "end":
                if depth == 0:
                    yield i, action
                    return
                depth -= 1
            elif action.startswith("else") and depth == 0:
                yield i, action

    def run(start: int, stop: int, dot: dict[str, str]) -> str:
        out, i = "", start
        while i < stop:
            step = steps[i]
            if i % 2 == 0:
                out += step
            elif step.startswith("range "):
                end = next(place for place, action in block(i) if action == "end")
                for message in messages:
                    out += run(i + 1, end, {"Role": message["role"], "Content": message["content"]})
                i = end
            elif step.startswith("if "):
                borders = [(i, step), *block(i)]
                for (here, action), (there, _) in pairwise(borders):
                    words = re.findall(r'"[^"]*"|\S+', action.removeprefix("else ").removeprefix("if "))
                    holds = value(words[1], dot) == value(words[2], dot) if words[0] == "eq" else value(words[0], dot)
                    if holds:
                        out += run(here + 1, there, dot)
                        break
                i = borders[-1][0]
            elif "=" in step:
                name, _, word = re.split(r"\s+", step)
                variables[name] = value(word, dot)
            else:
                out += value(step, dot)
            i += 1
        return out

    return run(0, len(steps), {"System": system})
