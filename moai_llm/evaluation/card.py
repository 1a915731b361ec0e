"""A model card, README.md of a model directory in the form of the Hugging Face Hub, from what the files say: config,
weights, recipe, the run's numbers and results of `moai eval`. What no file says is not in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moai_llm import __version__
from moai_llm.data.manifest import read_manifest
from moai_llm.evaluation.corpus import ALL, LANGUAGE
from moai_llm.evaluation.results import Results, Score, digest, name_of
from moai_llm.runtime import MoaiError
from moai_llm.training import environment
from moai_llm.training.events import read_metrics

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MIXERS = {"full_attention": "attention", "sliding_attention": "sliding-window attention", "linear_attention": "Mamba"}
FEED = {"dense": "dense", "sparse": "mixture of experts", "none": "none"}
SHOWN = 24  # rows of a table of results; the rest stays in its file


@dataclass
class About:
    """What a person says of a model, for no file knows it."""

    name: str | None = None
    license: str | None = None
    languages: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)


@dataclass
class Facts:
    """What the files of a model directory, and of its run, say."""

    path: Path
    config: dict[str, Any]
    parameters: int
    dtypes: list[str]
    weights: str
    chats: bool
    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]

    @property
    def ours(self) -> bool:
        return self.config.get("model_type") == "moai"


def read_facts(path: Path, run: Path | None = None) -> Facts:
    """Args:
        run: the folder of the run; found from the model's place in it when None.

    Raises:
        MoaiError: no weights, a config that is not JSON, a run without numbers.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise MoaiError(f"{path}: no weights in it (*.safetensors)")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoaiError(f"{path / 'config.json'} is not JSON: {error}") from None
    if run is None and path.parent.name == "checkpoints":
        run = path.parent.parent
    if run is not None and not (run / "metrics.jsonl").is_file():
        raise MoaiError(f"{run}: no run in it (metrics.jsonl)")
    parameters, dtypes = _weights(files)
    places = [folder / "recipe.yaml" for folder in (path, run) if folder is not None]
    recipe = next((_yaml(place) for place in places if place.is_file()), {})
    step = re.fullmatch(r"step-(\d+)", path.name)
    rows = read_metrics(run / "metrics.jsonl") if run else []
    if step:  # what came after this checkpoint is not of it
        rows = [row for row in rows if row["step"] <= int(step[1])]
    settings = _yaml(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    chats = (path / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
    return Facts(
        path, config, parameters, dtypes, digest(files), chats, recipe, rows, environment.read(run) if run else {}
    )


def _weights(files: Sequence[Path]) -> tuple[int, list[str]]:
    """(parameters, their types) from the heads of the files."""
    count, types = 0, Counter[str]()
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(size))
        for name, about in head.items():
            if name != "__metadata__":
                elements = 1
                for length in about["shape"]:
                    elements *= length
                count += elements
                types[about["dtype"]] += elements
    return count, [name for name, _ in types.most_common()]


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def require_of(facts: Facts, results: Sequence[tuple[str, Results]]) -> None:
    """Raises `MoaiError` where results are of other weights than these."""
    for name, found in results:
        if found.kind == "compare":
            raise MoaiError(f"{name} compares two models: give the results of this one")
        if found.models[0].weights != facts.weights:
            raise MoaiError(
                f"{name} was measured on other weights ({found.models[0].path}) than those in {facts.path}: evaluate "
                "this model, or name the one that was"
            )


# ---------------------------------------------------------------- the card


def card(facts: Facts, about: About, results: Sequence[Results] = ()) -> str:
    """The whole text, with its front matter."""
    from huggingface_hub import EvalResult, ModelCardData

    name = about.name or name_of(facts.path)
    scores = [(found, score) for found in results for score in _main_scores(found)]
    metrics = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_slug(score.task),
            dataset_name=_base(score.task),
            dataset_args=None if score.num_fewshot is None else {"num_few_shot": score.num_fewshot},
            metric_type=_slug(score.metric),
            metric_name=score.metric,
            metric_value=score.value,
        )
        for _, score in scores
    ]
    base = about.base_model or _hub_id(_of(facts.recipe, "train", "init_from"))
    data = ModelCardData(
        language=about.languages or None,
        license=about.license,
        library_name="moai-llm" if facts.ours else "transformers",
        pipeline_tag="text-generation",
        tags=[*_tags(facts), *(tag for tag in about.tags if tag not in _tags(facts))] or None,
        base_model=base,
        datasets=about.datasets or _datasets(facts) or None,
        model_name=name if metrics else None,
        eval_results=metrics or None,
    )
    body = "\n".join(_body(facts, about, name, results))
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def check(text: str) -> None:
    """Raises `MoaiError` where the Hub's own reader does not read the card as it was meant."""
    from huggingface_hub import ModelCard, ModelCardData

    try:
        again = ModelCard(text)
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise MoaiError(f"the card is not what the Hub reads: {error}") from None
    head = yaml.safe_load(text.split("---\n")[1])
    given = sum(len(one["metrics"]) for entry in head.get("model-index") or [] for one in entry["results"])
    assert isinstance(again.data, ModelCardData)
    read = len(again.data.eval_results or [])
    if given != read:
        raise MoaiError(f"of {given} results the Hub reads {read}")


def _main_scores(found: Results) -> Iterator[Score]:
    """Those that belong into the front matter: of tasks as a whole, and of files."""
    for score in found.scores:
        if score.value is None or score.group is not None:
            continue
        of_file = score.metric == "bits_per_byte" and score.task != ALL and not score.task.startswith(LANGUAGE)
        if found.kind == "tasks" or found.kind == "perplexity" and of_file:
            yield score


def _body(facts: Facts, about: About, name: str, results: Sequence[Results]) -> Iterator[str]:
    yield f"# {name}\n"
    description = facts.recipe.get("description")
    if description:
        yield f"{description}\n"
    yield "## Model\n"
    yield from _table(("", ""), _model_rows(facts))
    rows = list(_training_rows(facts))
    if rows:
        yield "## Training\n"
        yield from _table(("", ""), rows)
    if results:
        yield "## Evaluation\n"
        for found in results:
            yield from _evaluation(found)
    yield "## Use\n"
    yield from _use(facts, name)
    yield f"This card was written by moai-llm {__version__} from the files of the model.\n"


def _model_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    config = facts.config
    yield "class", ", ".join(config.get("architectures") or [str(config.get("model_type"))])
    yield "parameters", f"{facts.parameters:,}"
    if facts.ours and "sparse" in (config.get("mlp_layer_types") or ()):
        from moai_llm.config import read_config

        yield "active for a token", f"{read_config(facts.path / 'config.json').parameters()['active']:,}"
    yield "weights", ", ".join(facts.dtypes)
    for label, key in (("width", "hidden_size"), ("layers", "num_hidden_layers")):
        if key in config:
            yield label, f"{config[key]:,}"
    for label, key, names in (("token mixers", "layer_types", MIXERS), ("channel mixers", "mlp_layer_types", FEED)):
        if config.get(key):
            counted = Counter(config[key])
            yield label, ", ".join(f"{count} {names.get(kind, kind)}" for kind, count in counted.items())
    if "sparse" in (config.get("mlp_layer_types") or ()):
        yield "experts", f"{config['num_experts']}, {config['num_experts_per_tok']} for each token"
    if "vocab_size" in config:
        yield "vocabulary", f"{config['vocab_size']:,}"
    if "max_position_embeddings" in config:
        yield "context", f"{config['max_position_embeddings']:,} tokens"
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        yield "RoPE", f"{rope['rope_type']}, factor {rope.get('factor')}"
    yield "chat template", "yes" if facts.chats else "no"
    yield "sha256 of the weights", f"`{facts.weights[:16]}`"


def _training_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    recipe = facts.recipe
    start = _of(recipe, "train", "init_from")
    if start:
        yield "started from", f"`{_base(str(start))}`"
    stores = list(_stores(recipe))
    if stores:
        yield "data", ", ".join(f"`{_base(store)}`" for store in stores)
    for label, section, key in (
        ("loss", "loss", "type"), ("optimizer", "optim", "name"), ("learning rate", "optim", "lr"),
        ("schedule", "schedule", "name"), ("row length", "data", "seq_len"), ("tokens a step", "train", "batch_tokens"),
        ("precision", "train", "precision"), ("seed", "train", "seed"),
    ):  # fmt: skip
        value = _of(recipe, section, key)
        if value is not None:
            yield label, f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)
    if facts.rows:
        yield "steps", f"{facts.rows[-1]['step']:,}"
    for label, key, form in (
        ("tokens seen", "tokens", "{:,}"), ("last loss in training", "loss", "{:.4f}"),
        ("last loss on held-out data", "eval_loss", "{:.4f}"), ("bits per byte there", "bits_per_byte", "{:.4f}"),
    ):  # fmt: skip
        values = [row[key] for row in facts.rows if isinstance(row.get(key), (int, float))]
        if values:
            yield label, form.format(values[-1])
    sessions = facts.environment.get("sessions") or []
    if sessions:
        last = sessions[-1]
        packages = last.get("packages") or {}
        used = [f"{key} {last[key]}" for key in ("moai_llm", "python") if last.get(key)]
        used += [f"{key} {packages[key]}" for key in ("torch", "transformers") if packages.get(key)]
        if used:
            yield "software", ", ".join(used)


def _evaluation(found: Results) -> Iterator[str]:
    kept = [score for score in found.scores if score.value is not None and score.group is None]
    said = {key: value for key, value in found.settings.items() if value not in (None, False, [], "")}
    settings = ", ".join(f"{key} {value}" for key, value in said.items())
    library = f", lm-eval {found.versions['lm_eval']}" if found.kind == "tasks" and "lm_eval" in found.versions else ""
    yield f"`moai eval {found.kind}`, {found.created[:10]}{library}{f' ({settings})' if settings else ''}:\n"
    rows = []
    for score in kept[:SHOWN]:
        spread = f"{score.stderr:.4f}" if score.stderr is not None else ""
        if score.low is not None and score.high is not None:
            spread = f"{score.low:.4f} to {score.high:.4f}"
        shots = "" if score.num_fewshot is None else f", {score.num_fewshot} examples"
        rows.append((f"{_base(score.task)}{shots}", score.metric, f"{score.value:.4f}", spread, f"{score.documents:,}"))
    yield from _table(("task", "metric", "value", "± stderr or 95 % interval", "documents"), rows)
    if len(kept) > SHOWN:
        yield f"{len(kept) - SHOWN} more rows are left out here.\n"


def _use(facts: Facts, name: str) -> Iterator[str]:
    if facts.ours:
        verb = "chat" if facts.chats and _is_chat(facts) else "generate"
        line = f"moai {verb} {name}" + (" --prompt TEXT" if verb == "generate" else "")
        yield f"```bash\npip install moai-llm\n{line}\n```\n"
    else:
        yield (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n'
        )


def _is_chat(facts: Facts) -> bool:
    """Whether it was fine-tuned: a template alone is in every directory of ours."""
    return bool(_of(facts.recipe, "train", "init_from"))


def _table(columns: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    yield from (f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    yield ""


def _tags(facts: Facts) -> list[str]:
    kinds, feed = set(facts.config.get("layer_types") or ()), set(facts.config.get("mlp_layer_types") or ())
    tags = ["moai"] if facts.ours else []
    tags += ["mamba"] if "linear_attention" in kinds and facts.ours else []
    tags += ["moe"] if "sparse" in feed else []
    return [*tags, *(["conversational"] if facts.chats and _is_chat(facts) else [])]


def _stores(recipe: dict[str, Any]) -> Iterator[str]:
    """What a recipe trains on, by name."""
    data = recipe.get("data") or {}
    parts = [data.get("train"), *(data.get("mixture") or []), *(data.get("stages") or [])]
    found: list[str] = []
    while parts:
        part = parts.pop(0)
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += [value for key, value in part.items() if key in ("store", "train", "mixture", "sources")]
    yield from dict.fromkeys(found)


def _datasets(facts: Facts) -> list[str]:
    """Data sets of the Hub that the stores were made of, where the stores still lie here. A store names such a source
    with its split behind a colon, which no file or folder has.
    """
    found: list[str] = []
    for store in _stores(facts.recipe):
        try:
            sources = read_manifest(Path(store) / "manifest.json")[0].get("sources") or []
        except (MoaiError, OSError):
            continue
        for source in map(str, sources):
            name, colon, _ = source.removeprefix("hf:").partition(":")
            if colon and HUB_ID.fullmatch(name):
                found.append(name)
    return list(dict.fromkeys(found))


def _hub_id(name: Any) -> str | None:
    """A name of the Hub, and no folder of this machine."""
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _of(recipe: dict[str, Any], section: str, key: str) -> Any:
    part = recipe.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _base(task: str) -> str:
    """A file by its name alone: the folders of a machine are nobody's business."""
    return task.rstrip("/").rpartition("/")[2] or task


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", _base(text)).strip("_") or "text"
