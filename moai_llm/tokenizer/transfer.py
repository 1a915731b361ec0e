"""From one tokenizer to another: which old tokens stand for each new one. By this plan a model moves to a new
vocabulary; its tensors are the business of `moai_llm.modeling.vocabulary`.

A token keeps its meaning where both tokenizers have the same bytes, or the same special token. Any other new token is
spelled in old ones, as the old tokenizer cuts its bytes. For a tokenizer that continues the merges of the old one this
spelling is exact: replacing each new token of a text by its expansion gives the old encoding of that text.
"""

from __future__ import annotations

import json

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import BYTE_OF, spell, unspell
from moai_llm.tokenizer.load import END_OF_TEXT, PAD, TURN_END, TURN_START, Tokenizer

Expansions = dict[int, tuple[int, ...]]

# What special tokens are for, with the names they go by in other families. The roles a tokenizer's own configuration
# names (the first three) come before these spellings.
ROLES = {
    "eos_token": (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
    "bos_token": ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]"),
    "pad_token": (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]"),
    "turn start": (TURN_START, "<|start_header_id|>", "<start_of_turn>", "<|start|>"),
    "turn end": (TURN_END, "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>"),
}


def expansions(old: Tokenizer, new: Tokenizer) -> Expansions:
    """New id -> the old ids that stand for it: one where the meaning is carried over, several where the new token is
    spelled in old ones.

    Left out are the new ids that no old token says anything about: special tokens the old tokenizer has neither by
    name nor by role, and bytes it cannot write. An old special token stands for at most one new one, so that two
    tokens never share its probability.

    Raises:
        MoaiError: one of the tokenizers is not byte-level.
    """
    ours, theirs = _require_byte_level(new, "new"), _require_byte_level(old, "old")
    old_id = {name: i for i, name in sorted(theirs.items(), reverse=True)}
    old_added = {token.content: i for i, token in old.backend.get_added_tokens_decoder().items()}
    new_added = {i: token.content for i, token in new.backend.get_added_tokens_decoder().items()}
    found: Expansions = {i: (old_added[text],) for i, text in new_added.items() if text in old_added}
    cut = _Cutter(old, same_split=_split(old) == _split(new))
    for i, name in ours.items():
        if i not in found:
            parts = (old_id[name],) if name in old_id else cut(name)
            if parts:
                found[i] = parts
    return found | _by_role(old, new, {parts[0] for i, parts in found.items() if i in new_added}, set(found))


def vocabulary_rows(old: Tokenizer, new: Tokenizer, old_size: int) -> list[tuple[int, ...]]:
    """`expansions` as one tuple for each row of a model of the new tokenizer, padding rows included.

    New padding rows, which no token uses (behind the vocabulary, or in a gap of it), take over those of the old model,
    in turn: it has learned never to emit them. Where it has none, they and the tokens nothing is known about get ().

    Args:
        old_size: rows of the old model's embedding.

    Raises:
        MoaiError: the old tokenizer has ids beyond the embedding, or one of them is not byte-level.
    """
    found, known, wanted = expansions(old, new), ids_of(old), ids_of(new)
    if max(known) >= old_size:
        raise MoaiError(
            f"the model has {old_size:,} rows in its embedding and its tokenizer ids up to {max(known):,}: they do not "
            "belong together"
        )
    spare = [i for i in range(old_size) if i not in known]
    rows, padding = [], 0
    for i in range(new.padded_vocab_size):
        if i in wanted or not spare:
            rows.append(found.get(i, ()))
        else:
            rows.append((spare[padding % len(spare)],))
            padding += 1
    return rows


def _by_role(old: Tokenizer, new: Tokenizer, taken: set[int], done: set[int]) -> Expansions:
    """Special tokens that go by another name, matched by what they are for."""
    found: Expansions = {}
    for role in ROLES:
        wanting = [i for i in _of_role(new, role) if i not in done and i not in found]
        free = [i for i in _of_role(old, role) if i not in taken]
        for ours, theirs in zip(wanting, free):
            found[ours] = (theirs,)
            taken.add(theirs)
    return found


def _of_role(tokenizer: Tokenizer, role: str) -> list[int]:
    names = [tokenizer.roles[role]] if role in tokenizer.roles else []
    known = dict.fromkeys((*names, *ROLES[role]))  # each once
    return [tokenizer.special_ids[name] for name in known if name in tokenizer.special_ids]


class _Cutter:
    """The old tokenizer's segmentation of a token's bytes, in the alphabet of byte-level files.

    A token of the same split lies within one piece of it, so the merges alone decide. Under another split the bytes
    are first cut as the old one would, where they are text.
    """

    def __init__(self, old: Tokenizer, same_split: bool) -> None:
        self.model = old.backend.model
        self.split = None if same_split else old.backend.pre_tokenizer

    def __call__(self, name: str) -> tuple[int, ...]:
        tokens = [token for piece in self._pieces(name) for token in self.model.tokenize(piece)]
        whole = "".join(token.value for token in tokens) == name
        return tuple(token.id for token in tokens) if whole else ()

    def _pieces(self, name: str) -> list[str]:
        if self.split is None:
            return [name]
        try:
            text = (unspell(name) or b"").decode("utf-8")
        except UnicodeDecodeError:  # a part of a character
            return [name]
        pieces = [piece for piece, _ in self.split.pre_tokenize_str(text)]
        return pieces if "".join(pieces) == name else [name]  # not where it puts a space in front


def _split(tokenizer: Tokenizer) -> object:
    return json.loads(tokenizer.backend.to_str()).get("pre_tokenizer")


def _require_byte_level(tokenizer: Tokenizer, which: str) -> dict[int, str]:
    """Id -> name in the byte alphabet, of all but the special tokens."""
    pre = _split(tokenizer)
    steps = pre.get("pretokenizers", [pre]) if isinstance(pre, dict) else []
    added = tokenizer.backend.get_added_tokens_decoder()
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    names = {i: name for name, i in vocabulary.items() if i not in added}
    if not any(step["type"] == "ByteLevel" for step in steps) or not all(
        c in BYTE_OF for n in names.values() for c in n
    ):
        raise MoaiError(
            f"the {which} tokenizer is not byte-level: what bytes its tokens stand for is not known, so rows cannot be "
            "carried over. Byte-level are those of `moai tokenizer train`, GPT-2, Llama 3 and Qwen"
        )
    plain = {i: token.content for i, token in added.items() if not token.special}
    return names | {i: spell(text.encode("utf-8")) for i, text in plain.items()}


def ids_of(tokenizer: Tokenizer) -> set[int]:
    """The ids that a token has; some tokenizers leave gaps between them."""
    return set(tokenizer.backend.get_vocab(with_added_tokens=True).values())
