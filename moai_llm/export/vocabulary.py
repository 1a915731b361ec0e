"""A tokenizer as llama.cpp reads one: tokens, their kinds, merges, and the name of a rule that splits text.

llama.cpp knows splits by name only, and some of them approximately: its regular expressions cannot tell upper from
lower case outside A-Z. `as_read` builds what llama.cpp would do from what a file holds, so that an export can compare
ids before anyone runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import models

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import ByteLevelBPE, build_bpe, parse_bpe, spell
from moai_llm.tokenizer.chat import can_chat, turn_ends
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT, O200K_SPLIT
from moai_llm.tokenizer.templates import TEMPLATES

QWEN2_SPLIT = CL100K_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_REST = r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(letters: str) -> str:
    """o200k's split as llama.cpp writes it: every letter outside a-z may be upper, every one outside A-Z lower case."""
    upper, lower = rf"(?:(?=[{letters}])[^a-z])", rf"(?:(?=[{letters}])[^A-Z])"
    words = [rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{first}{lower}{second}{_CONTRACTION}" for first, second in ("*+", "+*")]
    return "|".join(words) + _REST


@dataclass(frozen=True)
class Rule:
    """A split that llama.cpp knows by `name`: the pattern it stands for, as llama.cpp has it, and whether a piece that
    is itself a token is taken whole.
    """

    name: str
    pattern: str
    whole: bool = False


# our pattern -> the rules that stand for it, the closest first
RULES: dict[str, tuple[Rule, ...]] = {
    GPT2_SPLIT: (Rule("gpt-2", GPT2_SPLIT),),
    QWEN2_SPLIT: (Rule("qwen2", QWEN2_SPLIT),),
    CL100K_SPLIT: (Rule("llama-bpe", CL100K_SPLIT, whole=True), Rule("dbrx", CL100K_SPLIT)),
    O200K_SPLIT: (
        Rule("granite-embed-multi-97m", _cased(r"\p{L}\p{M}"), whole=True),
        Rule("gpt-4o", _cased(r"\p{L}")),  # older than the other by two years
    ),
}


class Kind(IntEnum):
    """Kinds of tokens, by llama.cpp's numbers."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class Vocabulary:
    """What a file holds of a tokenizer.

    Attributes:
        ids: of the tokens with a role, by llama.cpp's name of it.
        chat_template: Jinja that needs nothing of transformers.
        notes: where llama.cpp may cut text otherwise, for people.
    """

    rule: Rule
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    ids: dict[str, int]
    chat_template: str | None
    notes: list[str] = field(default_factory=list)


def vocabulary(tokenizer: Tokenizer, split: str | None = None) -> Vocabulary:
    """What a file must hold of a tokenizer.

    Args:
        split: the name of the rule to take; the closest one when None.

    Raises:
        MoaiError: llama.cpp has no rule for this tokenizer, or not this one; the message says why.
    """
    spec = json.loads(tokenizer.backend.to_str())
    bpe = parse_bpe(spec)
    notes = _normalizer_notes(bpe.normalizer)
    if bpe.pattern not in RULES:
        raise MoaiError(
            "llama.cpp knows splits of text by name, and that of this tokenizer is none of them: "
            f"{bpe.pattern!r}. It knows those of GPT-2, Qwen, Llama 3 (cl100k_base) and o200k_base"
        )
    rule = _rule(bpe, split)
    if rule.pattern != bpe.pattern:
        marks = "" if r"\p{M}" in rule.pattern else ", and combining marks (नमस्ते) are no letters"
        notes.append(
            f"llama.cpp splits text by its rule {rule.name}, which is close to this tokenizer's: outside A-Z letters "
            f"have no case there, so capitals such as ÉCOLE are cut otherwise{marks}"
        )
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = {i: name for name, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens: list[str] = []
    kinds: list[int] = []
    for i in range(tokenizer.vocab_size):
        if i in added:
            tokens.append(added[i]["content"])
            kinds.append(Kind.CONTROL if added[i]["special"] else Kind.USER_DEFINED)
        else:
            tokens.append(names.get(i, f"[unused{i}]"))
            kinds.append(Kind.NORMAL if i in names else Kind.UNUSED)
    merges = [f"{spell(bpe.tokens[left])} {spell(bpe.tokens[right])}" for left, right in bpe.merges]
    template = tokenizer.chat_template
    if template is None and can_chat(tokenizer):  # by its control tokens
        template = next(
            known.jinja for known in TEMPLATES.values() if all(t in tokenizer.special_ids for t in known.tokens)
        )
    return Vocabulary(rule, tokens, kinds, merges, _roles(tokenizer), template and _plain_jinja(template), notes)


def as_read(rule: Rule, tokens: Sequence[str], kinds: Sequence[int], merges: Iterable[str]) -> tokenizers.Tokenizer:
    """What llama.cpp makes of a file's vocabulary: its split by `rule`, the file's tokens and merges."""
    known = (Kind.NORMAL, Kind.USER_DEFINED)
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind in known}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = build_bpe(vocab, pairs, rule.pattern)
    backend.model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=rule.whole)
    backend.add_tokens([token for token, kind in zip(tokens, kinds) if kind == Kind.USER_DEFINED])
    return backend


def disagreements(backend: tokenizers.Tokenizer, tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, list[str]]:
    """How many texts there are, and those that `as_read` gives other ids than the tokenizer does."""
    texts = list(texts)
    ours = tokenizer.encode_batch(texts)
    theirs = backend.encode_batch_fast(texts, add_special_tokens=False)
    return len(texts), [text for text, mine, other in zip(texts, ours, theirs) if mine != other.ids]


def _rule(bpe: ByteLevelBPE, split: str | None) -> Rule:
    """The first rule that joins as this tokenizer does. Whether whole pieces count matters only where some token is not
    what the merges make of its bytes.
    """
    model = models.BPE(
        vocab={spell(token): i for token, i in bpe.ids.items()},
        merges=[(spell(bpe.tokens[left]), spell(bpe.tokens[right])) for left, right in bpe.merges],
    )
    made = all(len(model.tokenize(spell(token))) == 1 for token in bpe.ids)
    rules = {rule.name: rule for rule in RULES[bpe.pattern] if made or rule.whole == bpe.ignore_merges}
    if not rules:
        raise MoaiError(
            "some tokens of this tokenizer are not what its merges make of their bytes, and no rule of llama.cpp for "
            f"its split treats those alike (ignore_merges: {str(bpe.ignore_merges).lower()})"
        )
    if split is not None and split not in rules:
        raise MoaiError(f"llama.cpp's rules for this tokenizer are {', '.join(rules)}, not {split!r}")
    return rules[split] if split is not None else next(iter(rules.values()))


def _normalizer_notes(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] != "NFC":
        raise MoaiError(
            f"this tokenizer changes text before it cuts it ({normalizer['type']}), and llama.cpp does not: ids would "
            "not be those the model knows"
        )
    return ["this tokenizer composes text first (NFC), llama.cpp does not: text that is not NFC gets other ids"]


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {"eos": tokenizer.eos_id}
    for name, role in (("bos", "bos_token"), ("padding", "pad_token")):
        token = tokenizer.roles.get(role)
        if token in tokenizer.special_ids:
            ids[name] = tokenizer.special_ids[token]
    ends = turn_ends(tokenizer)
    if ends:
        ids["eot"] = ends[0]
    if len(ends) > 1:
        ids["eom"] = ends[1]
    return ids


def _plain_jinja(template: str) -> str:
    """Without transformers' `{% generation %}`, which marks and changes nothing; a block that is always true keeps the
    white space as it was.
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
