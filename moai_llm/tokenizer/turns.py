"""A template that we know, bound to a tokenizer: conversations turn by turn, control tokens by id, the rest as text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple
from weakref import proxy

from moai_llm.tokenizer.encoder import Encoder, valid
from moai_llm.tokenizer.templates import CONTROL, Message, Template, Tool

if TYPE_CHECKING:
    from moai_llm.tokenizer.load import Tokenizer


class _Opening(NamedTuple):
    """How a role's turn begins: `ids` up to the last control token of the header, then the text `lead`."""

    ids: list[int]
    lead: str
    lead_ids: list[int]


class TurnEncoder:
    """A template that we know, bound to a tokenizer.

    Text between two control tokens is encoded as one, header and content together, so that ids are those of the whole
    text, which is what transformers encodes.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        added = added_ids(tokenizer)
        self.name, self._template, self._added = template.name, template, added
        self._tokenizer = proxy(tokenizer)  # what is bound to a tokenizer must not keep it alive
        self.ends = [added[token] for token in (template.end, *template.other_ends) if token in added]
        self._begin = [added[token] for token in CONTROL.findall(template.begin)]
        self._end = [added[template.end]]
        self._after = tokenizer.encode(template.after) if template.after else []
        self._openings: dict[str, _Opening] = {}
        self._encoder: Encoder | None = None  # made where it is needed: it is a second copy of the vocabulary

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, prompt: bool
    ) -> tuple[list[int], list[bool]]:
        encode = self._tokenizer.encode
        ids, learn = list(self._begin), [False] * len(self._begin)
        for role, text, wanted in self._template.turns(messages, tools):
            opening = self._openings.get(role) or self._opening(role)
            run = encode(opening.lead + text)
            ids += opening.ids
            ids += run
            ids += self._end
            ids += self._after
            if wanted:
                said = self._said_from(run, opening, text)
                learn += [False] * (len(opening.ids) + said)
                learn += [True] * (len(run) - said + len(self._end))
            learn += [False] * (len(ids) - len(learn))
        if prompt:
            opening = self._opening(self._template.names.get("assistant", "assistant"))
            ids += opening.ids + opening.lead_ids
            learn += [False] * (len(ids) - len(learn))
        return ids, learn

    def _opening(self, role: str) -> _Opening:
        """The header of a role."""
        encode = self._tokenizer.encode
        *pieces, lead = re.split(f"({CONTROL.pattern})", self._template.header.format(role=role))
        ids = [i for p in pieces if p for i in ([self._added[p]] if p in self._added else encode(p))]
        self._openings[role] = _Opening(ids, lead, encode(lead))
        return self._openings[role]

    def _said_from(self, run: list[int], opening: _Opening, text: str) -> int:
        """The first token of a run that holds something of the text."""
        header = len(opening.lead_ids)
        if run[:header] == opening.lead_ids:
            return header
        # a text that begins with a line end may share a token with the header's: learned, as transformers does
        whole = opening.lead + valid(text)
        ends = list(accumulate(len(self._tokenizer.token_bytes(i)) for i in run))
        if ends[-1] == len(whole.encode()):
            return bisect_right(ends, len(opening.lead.encode()))
        self._encoder = self._encoder or Encoder(self._tokenizer.backend)
        places = self._encoder.plain.encode(whole, add_special_tokens=False).offsets
        return next((i for i, (_, end) in enumerate(places) if end > len(opening.lead)), len(run))


def can_be_cut(tokenizer: Tokenizer, template: Template) -> bool:
    """Whether pieces of text between control tokens get the ids they have in the whole text, and nobody can write the
    control tokens. Not so where spaces belong to a token or to the beginning of a text, or where a token that the
    template writes is an ordinary one to the tokenizer, as Qwen's <tool_call>.
    """
    added = tokenizer.backend.get_added_tokens_decoder().values()
    written = [token for token in added if token.content in template.jinja and not token.content.isspace()]
    plain = all(token.special and not (token.lstrip or token.rstrip) for token in written)
    return plain and "Metaspace" not in repr(tokenizer.backend.pre_tokenizer)


def added_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each added token, by its string."""
    return {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
