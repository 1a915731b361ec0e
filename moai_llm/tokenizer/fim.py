"""Fill in the middle: a document is cut in three and rearranged, so that a model which only reads forward learns to
write what belongs between a prefix and a suffix.

The middle is a piece of syntax, as in AST-FIM (Gong et al., arXiv 2506.00204): a whole expression, statement, block or
function is what an editor asks for, where a random span mostly begins and ends inside one. The tree chooses places in
the text and nothing else. The two orders and their joint training are those of Bavarian et al. (arXiv 2207.14255), the
names of the tokens those of Qwen's code models:

    psm    <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle <|endoftext|>
    spm    <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle <|endoftext|>

In spm order what a person types is the end of the prompt, so a cache of the rest stays valid. The text is cut in
characters and the three parts are encoded apart, because at inference they come apart too.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.syntax import Lines, Span, syntax_of

FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
# all six names of the format; the last three are for padding a prompt and for files of one repository in a row
FIM_TOKENS = (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
LONGEST = 0.5  # a middle is at most this share of its document, so that something is left to conclude it from

Order = Literal["psm", "spm"]


@dataclass(frozen=True)
class Fim:
    """How documents are rearranged.

    rate: the share of documents.
    order: both is half psm, half spm.
    seed: what is done to a document depends on this and the document's index only.
    """

    rate: float = 0.5
    order: Literal["both", "psm", "spm"] = "both"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise MoaiError(f"the rate of fill-in-the-middle must lie above 0 and be at most 1, got {self.rate}")
        if self.order not in ("both", "psm", "spm"):
            raise MoaiError(f"the order of fill-in-the-middle is both, psm or spm, got {self.order!r}")


class FimExample(NamedTuple):
    """`learn` is true where the token is one to learn."""

    ids: list[int]
    learn: list[bool]


def fim_spans(source: str, rng: random.Random, *, language: str | None = "python", count: int = 1) -> list[Span]:
    """Places [start, end) in characters for `count` middles, drawn independently; none for a text without any.

    Half are one node of the syntax, drawn in proportion to its length, which gives every depth of the tree the same
    weight; half are neighbours in a block, from one to all of them. Text without syntax (see `syntax_of`) gives
    random runs of whole lines, and a text of one line random spans.

    Raises:
        MoaiError: a language that is not known, or whose grammar is not installed.
    """
    if not source.strip():
        return []
    longest = max(1, int(LONGEST * len(source)))
    syntax = syntax_of(source, language)
    nodes = [(a, b) for a, b in syntax.nodes if 0 < b - a <= longest] if syntax else []
    runs = syntax.runs if syntax else []
    if not nodes:
        lines = Lines(source).starts
        return [_random_span(len(source), lines, longest, rng) for _ in range(count)]
    node_weights = list(accumulate(b - a for a, b in nodes))
    run_weights = list(accumulate(run[-1][1] - run[0][0] for run in runs))
    spans = []
    for _ in range(count):
        span = nodes[_draw(node_weights, rng)]
        if runs and rng.random() < 0.5:
            span = _part_of_run(runs[_draw(run_weights, rng)], longest, rng) or span
        spans.append(span)
    return spans


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, order: Order = "psm") -> list[int]:
    """The ids after which a model writes the middle.

    Raises:
        MoaiError: a tokenizer without the tokens of the format.
    """
    before, behind, middle = fim_ids(tokenizer)
    if order == "psm":
        return [before, *tokenizer.encode(prefix), behind, *tokenizer.encode(suffix), middle]
    return [before, behind, *tokenizer.encode(suffix), middle, *tokenizer.encode(prefix)]


def fim_example(
    tokenizer: Tokenizer,
    prefix: str,
    middle: str,
    suffix: str,
    order: Order = "psm",
    *,
    learn: Literal["all", "middle"] = "all",
) -> FimExample:
    """A training document: the prompt, the middle, and the end-of-text token that says the middle is complete.

    Args:
        learn: every token, or the middle and its end only.

    Raises:
        MoaiError: a tokenizer without the tokens of the format.
    """
    prompt = fim_prompt(tokenizer, prefix, suffix, order)
    answer = [*tokenizer.encode(middle), tokenizer.eos_id]
    return FimExample([*prompt, *answer], [learn == "all"] * len(prompt) + [True] * len(answer))


def fim_document(
    tokenizer: Tokenizer, source: str, fim: Fim, index: int, *, part: int = 0, language: str | None = "python"
) -> list[int] | None:
    """Ids of a document rearranged, or None where it stays as it is: a pure function of the text, `fim.seed`, and
    the number of the document and of its part.
    """
    rng = random.Random(f"{fim.seed}:{index}:{part}")
    if rng.random() >= fim.rate:
        return None
    order: Order = "psm" if rng.random() < 0.5 else "spm"
    if fim.order != "both":
        order = fim.order
    spans = fim_spans(source, rng, language=language)
    if not spans:
        return None
    start, end = spans[0]
    return fim_example(tokenizer, source[:start], source[start:end], source[end:], order).ids


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the prefix, suffix and middle tokens.

    Raises:
        MoaiError: a tokenizer without them.
    """
    names = (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)
    missing = [name for name in names if name not in tokenizer.special_ids]
    if missing:
        raise MoaiError(
            f"this tokenizer has no {', '.join(missing)}, which fill-in-the-middle needs: train one whose special "
            f"tokens include them, with `--special-tokens '{' '.join(FIM_TOKENS)}'` of `moai tokenizer train`"
        )
    before, behind, middle = (tokenizer.special_ids[name] for name in names)
    return before, behind, middle


def _draw(weights: Sequence[int], rng: random.Random) -> int:
    """An index in proportion to weights, which are given summed up."""
    return bisect_right(weights, int(rng.random() * weights[-1]))


def _part_of_run(run: list[Span], longest: int, rng: random.Random) -> Span | None:
    """Neighbours of a run, the first and the last drawn; the last ones are left off until it is short enough, None
    where even the first is too long.
    """
    first, last = sorted((int(rng.random() * len(run)), int(rng.random() * len(run))))
    start = run[first][0]
    ends = [end for _, end in run[first : last + 1] if end - start <= longest]
    return (start, ends[-1]) if ends else None


def _random_span(length: int, lines: list[int], longest: int, rng: random.Random) -> Span:
    """Whole lines, one or more, no longer than `longest`; of a text of one line any span."""
    borders = [*(start for start in lines if start < length), length]
    if len(borders) == 2:
        borders = list(range(length + 1))
    first, last = sorted((int(rng.random() * (len(borders) - 1)), int(rng.random() * (len(borders) - 1))))
    start = borders[first]
    ends = [end for end in borders[first + 1 : last + 2] if end - start <= longest]
    return start, ends[-1] if ends else start + longest
