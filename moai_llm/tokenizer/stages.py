"""How a tokenizer came to be: one entry for its training and one for each extension, in `stages.json` beside it.

A stage says which ids it added, from which text, and the fingerprint of the tokenizer after it. So a vocabulary grown
from 64k to 80k to 96k can be traced, and a model trained on an earlier stage knows which rows are new.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moai_llm.runtime import MoaiError, logger, write_atomically
from moai_llm.tokenizer.load import Tokenizer

FILE = "stages.json"


@dataclass
class Stage:
    """One step. `first_id` and `added` are the ids it gave out, `vocab_size` counts all of them after it."""

    kind: str  # train or extend
    first_id: int
    added: int
    vocab_size: int
    fingerprint: str  # of the tokenizer after this stage
    settings: dict[str, object] = field(default_factory=dict)
    corpus: dict[str, dict[str, object]] = field(default_factory=dict)  # label -> sources, documents, bytes


def save_stages(directory: str | Path, stages: list[Stage]) -> None:
    content = json.dumps([asdict(stage) for stage in stages], indent=2, ensure_ascii=False)
    write_atomically(Path(directory) / FILE, content + "\n")


def load_stages(directory: str | Path, tokenizer: Tokenizer) -> list[Stage]:
    """The stages beside a tokenizer, in its directory or that of its file; none where it was
    made elsewhere or changed since.

    Raises:
        MoaiError: the file cannot be read.
    """
    path = Path(directory)
    file = (path.parent if path.is_file() else path) / FILE
    if not file.is_file():
        return []
    try:
        stages = [Stage(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise MoaiError(f"{file} cannot be read ({error}): delete it to go on without the history") from None
    if stages and stages[-1].fingerprint != tokenizer.fingerprint:
        logger.warning("%s tells of another tokenizer than lies beside it: its history is left out", file)
        return []
    return stages
