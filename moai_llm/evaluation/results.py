"""What an evaluation found, as JSON that says what was measured on what: one form for all, checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moai_llm import __version__
from moai_llm.inference import TextModel
from moai_llm.runtime import MoaiError, write_atomically

SCHEMA = "moai-eval/1"
PACKAGES = ("torch", "transformers", "lm_eval")
STRICT = ConfigDict(extra="forbid")


@dataclass
class ModelFacts:
    """Which model it was: `weights` is the sha256 over its weight files, `tokenizer` that of its tokenizer.json."""

    __pydantic_config__ = STRICT

    path: str
    type: str
    parameters: int
    dtype: str
    device: str
    context: int
    weights: str
    tokenizer: str
    vocabulary: int

    @property
    def name(self) -> str:
        return name_of(Path(self.path))


@dataclass
class Score:
    """One number of a table. `low` and `high` are the ends of its 95 % interval over documents."""

    __pydantic_config__ = STRICT

    task: str
    metric: str
    value: float | None
    documents: int
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = None
    num_fewshot: int | None = None
    group: str | None = None  # the task that this is a part of


@dataclass
class Item:
    """One document: what two models are compared by. `id` is a hash of its text, equal in every evaluation."""

    __pydantic_config__ = STRICT

    id: str
    task: str
    values: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Results:
    """An evaluation. `details` belongs to its kind."""

    __pydantic_config__ = STRICT

    kind: Literal["perplexity", "tasks", "experts", "long", "compare"]
    models: list[ModelFacts]
    settings: dict[str, Any]
    scores: list[Score]
    items: list[Item] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    schema: Literal["moai-eval/1"] = "moai-eval/1"
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def save(self, path: str | Path) -> None:
        """Write it as JSON; numbers that are none become null."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), json.dumps(_plain(asdict(self)), ensure_ascii=False, indent=1, allow_nan=False))


ADAPTER: TypeAdapter[Results] = TypeAdapter(Results)


def read_results(path: str | Path) -> Results:
    """Raises `MoaiError` where the file is not there or not of this form."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise MoaiError(f"{path}: {error.strerror}") from None
    try:
        return ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise MoaiError(f"{path} holds no results of `moai eval`: {place}: {first['msg']}") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the files."""
    return {"$id": SCHEMA, **ADAPTER.json_schema()}


def versions() -> dict[str, str]:
    """Of what was used, as far as it is installed."""
    found = {"moai_llm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def facts_of(text_model: TextModel) -> ModelFacts:
    model = text_model.model
    return ModelFacts(
        path=str(text_model.path),
        type=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        context=text_model.context,
        weights=digest(sorted(text_model.path.glob("*.safetensors"))),
        tokenizer=text_model.tokenizer.fingerprint,
        vocabulary=text_model.tokenizer.vocab_size,
    )


def name_of(path: Path) -> str:
    """Of a model, for people: the folder it lies in, or the run of a checkpoint."""
    parts = [part for part in path.resolve().parts if part not in ("model", "checkpoints")]
    return next((part for part in reversed(parts) if not part.startswith("step-")), "model")


def digest(files: Iterable[Path]) -> str:
    """sha256 over the contents of files, one after the other."""
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def identity(text: str) -> str:
    """Of a document: 16 digits of the sha256 of its text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
