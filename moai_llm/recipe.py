"""Recipe: one typed tree that says a whole run. A YAML file fills it, `a.b=c` on the command line overrides it.

The directory of YAML files is the registry of presets; there is no inheritance between files and one indirection:
`model: NAME` takes the model section of another recipe. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge

from moai_llm.architecture import Architecture
from moai_llm.bounds import Count, Positive
from moai_llm.mixture import SourceConfig, StageConfig, check_stages, of_the_meant_type, place_of, with_sources
from moai_llm.optimization import ClipConfig, GroupRule, LoraConfig, OptimConfig, ScheduleConfig
from moai_llm.representation import EmbeddingConfig
from moai_llm.runtime import MoaiError, did_you_mean
from moai_llm.synonyms import ELSEWHERE

if TYPE_CHECKING:
    from moai_llm.config import MoaiConfig

RECIPES = Path(__file__).parent / "recipes"

# loss.type -> its parameters; a test compares them with losses.py, which imports torch
LOSS_PARAMS = {
    "cross_entropy": ["z_weight"],
    "focal": ["gamma", "z_weight"],
    "label_smoothing": ["smoothing", "z_weight"],
    "multi_objective": ["ce_weight", "focal_weight", "smooth_weight", "focal_gamma", "smoothing", "z_weight"],
    "distillation": ["temperature", "kl_weight", "reverse_kl_weight", "ce_weight"],
    "dpo": ["beta", "label_smoothing", "sft_weight", "length_normalized"],
    "ipo": ["beta", "sft_weight", "length_normalized"],
    "simpo": ["beta", "gamma", "sft_weight"],
    "info_nce": [
        "temperature", "learned_temperature", "symmetric", "positives_inside", "false_negative_margin",
        "mask_equal_texts", "positive_score",
    ],
    "pairwise": ["margin"],
    "cosine": [],
}  # fmt: skip
REFERENCE = ("dpo", "ipo")  # losses that compare with the model they start from
PackingName = Literal["best-fit", "balanced", "next-fit", "concat", "none"]  # data/packing.py says what they do
OverlongName = Literal["split", "truncate", "drop"]
MAY_CHANGE = ("workers", "prefetch", "pin_memory")  # keys of `data` that change no batch
LENGTHS = ("steps", "tokens", "epochs")  # keys of `train`: exactly one says how long
# keys of `train` -> other ways to write a value
SPELLINGS: dict[str, dict[str | bool, str]] = {
    "activation_checkpointing": {True: "full", False: "none"},
    "precision": {"amp_bf16": "bf16", "amp_fp16": "fp16", "tf32": "fp32"},
}


@dataclass(kw_only=True)
class DataConfig:
    #: a prepared store (`moai data prepare`), or several: a list of {store, weight}
    train: str | list[SourceConfig] | None = None
    #: or stages, one after the other: a list of {train, until} or {train, epochs}
    stages: list[StageConfig] = field(default_factory=list)
    #: a prepared store for evaluation; None: no evaluation
    valid: str | None = None
    #: tokens in a row
    seq_len: Count = 1024
    #: how documents share rows: best-fit | balanced (rows of similar attention cost in each step) | next-fit |
    #: concat (cut wherever a row ends) | none (one a row)
    packing: PackingName = "best-fit"
    #: documents longer than a row: split into pieces | truncate to their beginning | drop; None splits text and
    #: truncates conversations
    overlong: OverlongName | None = None
    #: threads that make batches ahead of the training; 0: none, they are made in between
    workers: Annotated[int, Ge(0)] = 1
    #: steps they are ahead
    prefetch: Count = 4
    #: batches in memory that a CUDA device copies from by itself; None: where the device is one
    pin_memory: bool | None = None

    def run(self) -> list[StageConfig]:
        """What is trained on as stages; none where neither `train` nor `stages` is set."""
        return self.stages or ([StageConfig(train=self.train)] if self.train else [])

    def stores(self) -> list[str]:
        """Paths of the stores to train on, in order."""
        return [source.store for stage in self.run() for source in stage.sources()]


@dataclass(kw_only=True)
class LossConfig:
    #: cross_entropy | focal | label_smoothing | multi_objective | distillation | dpo | ipo | simpo | info_nce |
    #: pairwise | cosine
    type: str = "cross_entropy"
    params: dict[str, bool | float] = field(default_factory=dict)
    #: for distillation: the model directory to learn from, with the same tokenizer
    teacher: str | None = None


@dataclass(kw_only=True)
class TrainConfig:
    #: the run directory
    out: str = "runs/run"
    #: a model directory to go on from (continued pretraining, fine-tuning)
    init_from: str | None = None
    #: how long: exactly one of the three
    steps: Count | None = None
    tokens: Positive | None = None
    epochs: Positive | None = None
    #: tokens per optimizer step; gradient accumulation follows from it
    batch_tokens: Count = 65536
    #: rows per forward pass; auto: the largest power of two that fits into 0.85 of the memory
    micro_batch_size: Count | Literal["auto"] = 8
    #: look at the memory after each step: above 0.85 halve the micro-batch, below 0.65 double it
    dynamic_micro_batch: bool = False
    #: the largest norm of the gradient, under every `clip`
    max_grad_norm: Positive = 1.0
    seed: int = 0
    #: auto | cpu | cuda | cuda:1 ...
    device: str = "auto"
    #: auto is bf16 where the device is faster in it, else fp32; fp8: the linear layers, the rest in bf16
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    #: TF32 matrix products on CUDA for what stays in fp32
    tf32: bool = True
    compile: bool = False
    #: layers that are recomputed in the backward instead of keeping their activations: none | selective (every second)
    #: | full (all)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"

    #: keep in the host's memory instead of a CUDA device's: none | activations | optimizer (the states of AdamW) | all
    offload: Literal["none", "activations", "optimizer", "all"] = "none"

    @property
    def host_activations(self) -> bool:
        return self.offload in ("activations", "all")

    @property
    def host_optimizer(self) -> bool:
        return self.offload in ("optimizer", "all")

    def recomputes(self, layer: int) -> bool:
        """Whether this layer is recomputed in the backward."""
        return self.activation_checkpointing == "full" or self.activation_checkpointing == "selective" and not layer % 2


@dataclass(kw_only=True)
class CheckpointConfig:
    #: steps between checkpoints; the last step is always saved
    every: Count = 1000
    #: how many of the newest are kept
    keep_last: Count = 2
    #: checkpoints whose step is a multiple of this are kept for good; null: none
    permanent_every: Count | None = None
    #: write them while training goes on, from a copy of weights and states in memory
    asynchronous: bool = False


@dataclass(kw_only=True)
class HealthConfig:
    #: a step whose loss or gradient is not finite: skip it | stop the run
    nonfinite: Literal["skip", "stop"] = "skip"
    #: skip a step whose loss or gradient norm is so many standard deviations above the last ones; null: never
    spike_sigma: Positive | None = 6.0
    #: the steps it is compared with; none is skipped before half of them are there
    spike_window: Count = 128
    #: so many bad steps in a row are skipped; then the run is rolled back, takes them for a new level, or stops
    patience: Count = 10
    #: go back to the last good checkpoint and leave out the data since then
    rollback: bool = False
    #: after so many the run stops
    max_rollbacks: Count = 3
    #: seconds without a step after which the process ends itself and says where it hung; null: never
    hang_seconds: Positive | None = None


@dataclass(kw_only=True)
class EvalConfig:
    #: steps between evaluations on data.valid; 0: only at the end
    every: Annotated[int, Ge(0)] = 0
    #: rows of data.valid; None: all
    rows: Count | None = 64
    #: text to continue at each evaluation, to watch the model learn
    prompts: list[str] = field(default_factory=list)
    prompt_tokens: Count = 48


@dataclass(kw_only=True)
class LogConfig:
    #: steps between lines of metrics
    every: Count = 10
    #: trackers that hear the numbers beside metrics.jsonl
    to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    #: the name of the project at wandb and trackio
    project: str = "moai"


@dataclass(kw_only=True)
class Recipe:
    description: str = ""
    model: Architecture = field(default_factory=Architecture)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


def list_recipes() -> list[str]:
    """Names of the presets that ship with the package, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a preset by name or a YAML file by path, apply `a.b=c` overrides, validate once.

    One of `train.steps`, `train.tokens` and `train.epochs` among the overrides replaces the length the file gives, and
    one of `data.train` and `data.stages` the other.

    Raises:
        MoaiError: no such recipe, unreadable YAML, an unknown key (with the nearest known one), a value of the wrong
            type or out of range, or an architecture that contradicts itself.
    """
    tree = _read(name_or_path)
    if isinstance(tree.get("model"), str):
        tree["model"] = _read(tree["model"]).get("model", {})
    keys = [_override(tree, item) for item in overrides]
    length = [name for name in LENGTHS if f"train.{name}" in keys and tree["train"][name] is not None]
    if len(length) == 1:
        tree["train"] = {key: value for key, value in tree["train"].items() if key not in LENGTHS or key in length}
    given = [name for name in ("train", "stages") if f"data.{name}" in keys and tree["data"][name]]
    if len(given) == 1:
        tree["data"].pop("stages" if given == ["train"] else "train", None)
    recipe = from_tree(tree, source=str(name_or_path))
    of_model = [key for key in keys if key.split(".")[0] == "model"]
    if recipe.train.init_from and of_model:
        raise MoaiError(
            f"{', '.join(of_model)}: the model comes from train.init_from and cannot be changed; leave it out"
        )
    return recipe


def from_tree(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a nested mapping as a recipe; raises `MoaiError` like `load`."""
    from pydantic import TypeAdapter, ValidationError

    nested = (SourceConfig, StageConfig, GroupRule)
    for cls in (Recipe, *nested, *(t for t in get_type_hints(Recipe).values() if is_dataclass(t))):
        cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]
    try:
        recipe = TypeAdapter(Recipe).validate_python(_as_spelled_here(with_sources(tree)))
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(problem)}" for problem in of_the_meant_type(error.errors()))
        raise MoaiError(f"{source} is not a valid recipe:\n{lines}") from None
    try:
        recipe.model.resolve()
    except ValueError as error:
        raise MoaiError(f"{source}: model: {error}") from None
    _check(recipe, source)
    return recipe


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML types, every key written out."""
    tree = asdict(recipe)
    tree["optim"]["betas"] = None if recipe.optim.betas is None else list(recipe.optim.betas)
    return tree


def dump(recipe: Recipe) -> str:
    """YAML of the resolved recipe; loading it gives the same recipe."""
    import yaml

    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)


def get_config(name_or_path: str | Path) -> MoaiConfig:
    """A `MoaiConfig` from a preset name, a recipe YAML, a config JSON or a model directory.

    Raises:
        MoaiError: there is no such thing, or it is not valid.
    """
    from moai_llm.config import MoaiConfig, read_config

    path = Path(name_or_path)
    if path.is_dir() or path.suffix == ".json":
        return read_config(path / "config.json" if path.is_dir() else path)
    return MoaiConfig(**asdict(load(name_or_path).model))


def get_mamba_config(size: str) -> MoaiConfig:
    """get_mamba_config("2b") is get_config("moai-mamba-2b")."""
    return get_config(f"moai-mamba-{size}")


def _as_spelled_here(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with values that may be written in another way, too, written in the one that the recipe keeps."""
    train = tree.get("train")
    if not isinstance(train, dict):
        return tree
    if train.get("precision") == "tf32" and train.get("tf32") is False:
        raise MoaiError("train.precision=tf32 and train.tf32=false contradict each other: leave one of them out")
    spelled = {
        key: SPELLINGS[key].get(value, value) if key in SPELLINGS and isinstance(value, (str, bool)) else value
        for key, value in train.items()
    }
    return {**tree, "train": spelled}


def _check(recipe: Recipe, source: str) -> None:
    """What a type cannot say."""
    loss, rows = recipe.loss, (recipe.train.batch_tokens, recipe.data.seq_len)
    if loss.type not in LOSS_PARAMS:
        known = f"there are {', '.join(LOSS_PARAMS)}"
        raise MoaiError(f"{source}: loss.type {loss.type!r} is unknown; {known}{did_you_mean(loss.type, LOSS_PARAMS)}")
    for name in loss.params:
        if name not in LOSS_PARAMS[loss.type]:
            known = f"{loss.type} has {', '.join(LOSS_PARAMS[loss.type])}"
            raise MoaiError(
                f"{source}: loss.params.{name} is unknown; {known}{did_you_mean(name, LOSS_PARAMS[loss.type])}"
            )
    if (loss.type == "distillation") != (loss.teacher is not None):
        raise MoaiError(
            f"{source}: loss.type=distillation needs a model to learn from: set loss.teacher=MODEL_DIR"
            if loss.teacher is None
            else f"{source}: loss.teacher does nothing with loss.type={loss.type}: set loss.type=distillation"
        )
    if loss.type in REFERENCE and recipe.train.init_from is None:
        raise MoaiError(
            f"{source}: loss.type={loss.type} compares with the model it starts from: set train.init_from=MODEL_DIR"
        )
    try:
        recipe.embedding.check(recipe.loss.type, recipe.loss.params, recipe.lora.rank, recipe.eval.prompts)
    except ValueError as error:
        raise MoaiError(f"{source}: {error}") from None
    if recipe.data.train and recipe.data.stages:
        raise MoaiError(f"{source}: data.train and data.stages both say what to train on: leave one of them out")
    check_stages(recipe.data.run(), f"{source}: data.stages" if recipe.data.stages else f"{source}: data")
    if rows[0] < rows[1]:
        raise MoaiError(f"{source}: train.batch_tokens {rows[0]} is less than one row, data.seq_len {rows[1]}")
    if recipe.train.host_optimizer and recipe.optim.name != "adamw":
        raise MoaiError(
            f"{source}: train.offload={recipe.train.offload} keeps the states of adamw in the host's memory, not of "
            f"{recipe.optim.name}: set optim.name=adamw, or train.offload=activations"
        )
    if recipe.train.dynamic_micro_batch and recipe.train.compile:
        raise MoaiError(
            f"{source}: train.dynamic_micro_batch changes the sizes that train.compile compiles for, again and again: "
            "leave one of them out, or set train.micro_batch_size=auto, which is chosen once"
        )
    try:
        recipe.optim.check()
    except ValueError as error:
        raise MoaiError(f"{source}: optim.{error}") from None
    try:
        recipe.lora.check()
    except ValueError as error:
        raise MoaiError(f"{source}: lora.{error}") from None
    if recipe.lora.rank and recipe.train.init_from is None:
        raise MoaiError(
            f"{source}: lora.rank={recipe.lora.rank} trains adapters on a model that stays as it is, and fresh weights "
            "have nothing to keep: set train.init_from=MODEL_DIR"
        )
    if recipe.lora.rank and recipe.train.precision == "fp8":
        raise MoaiError(
            f"{source}: train.precision=fp8 computes the gradient of every weight, and adapters (lora) leave them "
            "frozen: set train.precision=bf16"
        )
    if recipe.lora.experts and recipe.train.compile:
        raise MoaiError(f"{source}: lora.experts changes weights inside each forward, which train.compile=true cannot "
                        "follow: leave one of them out")  # fmt: skip
    if recipe.lora.quantize and recipe.train.compile:
        raise MoaiError(f"{source}: lora.quantize={recipe.lora.quantize} unpacks weights in a way that "
                        "train.compile=true cannot follow: leave one of them out")  # fmt: skip
    if recipe.schedule.name == "plateau" and not recipe.eval.every:
        raise MoaiError(
            f"{source}: schedule.name=plateau follows the evaluations: set eval.every, and data.valid to evaluate on"
        )


def _read(name_or_path: str | Path) -> dict[str, Any]:
    import yaml

    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
        if not path.is_file():
            raise MoaiError(
                f"no recipe {str(name_or_path)!r}{did_you_mean(str(name_or_path), list_recipes())}; see `moai recipes`"
            )
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoaiError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MoaiError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        raise MoaiError(f"{path} is not a recipe: expected sections such as `model:` and `train:`")
    return tree


def _parse(text: str) -> Any:
    """YAML, where 1e3 is a number as it is everywhere else."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return yaml.load(text, Loader)


def _override(tree: dict[str, Any], item: str) -> str:
    """Set what "a.b=c" says; returns "a.b"."""
    import yaml

    key, separator, value = item.partition("=")
    if not separator:
        raise MoaiError(f"{item!r} is not an override; write section.key=value, e.g. train.steps=100")
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise MoaiError(f"{item!r}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = _parse(value)
    except yaml.YAMLError:
        node[leaf] = value
    return key.strip()


def _explain(problem: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: the dotted key, what is wrong, the nearest known key."""
    location = place_of(problem)
    dotted = ".".join(location)
    if problem["type"] == "unexpected_keyword_argument":
        return f"{dotted}: unknown key{_hint(location)}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{dotted}: {message}, got {problem['input']!r}"


def _hint(location: list[str]) -> str:
    """Where the key that was meant may live: under another name, in another section, or nearly so spelt here."""
    key = location[-1]
    if key in ELSEWHERE:
        return f" (here it is {ELSEWHERE[key]})"
    sections = [f.name for f in fields(Recipe) if key in _keys_at([f.name])]
    if sections:
        return f" (did you mean '{sections[0]}.{key}'?)"
    return did_you_mean(key, _keys_at(location[:-1]))


def _keys_at(location: list[str]) -> list[str]:
    """Keys of the section there; numbers in the location count items of a list."""
    hint: Any = Recipe
    for part in location:
        if not part.isdigit():
            hint = get_type_hints(_section(hint)).get(part) if _section(hint) else None
    cls = _section(hint)
    return [f.name for f in fields(cls)] if cls else []


def _section(hint: Any) -> Any:
    """The dataclass in a type: itself, an alternative of a union, or the item of a list."""
    if is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := _section(part))), None)
