"""How a model can be spread over devices, and what one device then holds and does.

One device is what this version runs. The other layouts are arithmetic, so that hardware can be chosen before there is a
launcher: data parallelism with weights, gradients and states replicated (ddp) or sharded (zero-1, zero-2, zero-3;
arXiv 1910.02054), matrices split inside a layer (tensor; 1909.08053), layers split over devices (pipeline, one forward
one backward; 2104.04473), experts split (expert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moai_llm.architecture import Architecture
from moai_llm.planning.activations import Kept, Setting, norm
from moai_llm.planning.step import BATCH, Brick, Memory, Step, bricks, peak
from moai_llm.recipe import Recipe

# optimizer -> bytes of state a parameter: of the matrices of the layers, and of everything else
OPTIMIZER_BYTES = {
    "adamw": (8.0, 8.0),
    "adamw_8bit": (2 + 8 / 256, 2 + 8 / 256),  # two states in 8 bits, each with a fp32 scale per 256
    "paged_adamw": (8.0, 8.0),
    "paged_adamw_8bit": (2 + 8 / 256, 2 + 8 / 256),
    "muon": (4.0, 8.0),  # a momentum; AdamW for embedding, head and vectors
    "adafactor": (0.01, 0.01),  # a row and a column for each matrix
    "lion": (4.0, 4.0),
    "sgd": (4.0, 4.0),
}
NODE = 8  # devices with fast links between them: tensor parallelism does not reach beyond


@dataclass(frozen=True)
class Layout:
    name: str
    data: int = 1  # devices that see different rows
    zero: int = 0
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def runs_here(self) -> bool:
        """Whether this version can train so."""
        return self.data * self.tensor * self.pipeline == 1


def layouts(a: Architecture, devices: int) -> list[Layout]:
    """What comes into question on so many devices, simplest first."""
    if devices == 1:
        return [Layout("one device")]
    found = [Layout("ddp", devices), *(Layout(f"zero-{zero}", devices, zero) for zero in (1, 2, 3))]
    tensor = _divisor(devices, lambda t: t <= NODE and a.num_attention_heads % t == 0)
    if tensor > 1:
        found.append(Layout(f"tensor {tensor}", devices // tensor, tensor=tensor))
    pipeline = _divisor(devices, lambda p: p <= a.num_hidden_layers)
    if pipeline > 1:
        found.append(Layout(f"pipeline {pipeline}", devices // pipeline, pipeline=pipeline))
    expert = _divisor(devices, lambda e: a.num_experts % e == 0)
    if expert > 1 and "sparse" in (a.mlp_layer_types or ()):
        found.append(Layout(f"expert {expert}", devices, expert=expert))
    return found


def memory(recipe: Recipe, layout: Layout, setting: Setting, accumulation: int) -> Memory:
    """The peak of the device that holds most."""
    stages = [stage(recipe, layout, setting, accumulation, number) for number in range(layout.pipeline)]
    return max((peak(step) for step in {0: stages[0], 1: stages[-1]}.values()), key=lambda found: found.total)


def stage(recipe: Recipe, layout: Layout, s: Setting, accumulation: int, number: int = 0) -> Step:
    """What a device of pipeline stage `number` does."""
    a, whole = _shard(recipe.model, layout), recipe.model
    first, last = number == 0, number == layout.pipeline - 1
    every = bricks(a, s, recipe.lora)
    per_stage = -(-len(every) // layout.pipeline)
    layers = every[number * per_stage : (number + 1) * per_stage]
    vocab = -(-whole.vocab_size // layout.tensor)
    positions = whole.max_position_embeddings * whole.hidden_size if whole.position_embedding == "learned" else 0
    embeds = vocab * whole.hidden_size + positions
    head = vocab * whole.hidden_size
    tied = whole.tie_word_embeddings and layout.pipeline == 1
    embeds_here = embeds if first else 0
    head_here = (head if last and not tied else 0) + (whole.brick_parameters()["norm"] if last else 0)
    matrices = sum(brick.parameters for layer in layers for brick in layer)
    weights = sum(brick.weights for layer in layers for brick in layer) + 4.0 * (embeds_here + head_here)
    outside = embeds + head_here
    if recipe.lora.rank:  # whatever is no adapter rests
        embeds_here = head_here = 0
    total = matrices + embeds_here + head_here
    of_matrices, of_others = OPTIMIZER_BYTES[recipe.optim.name]
    if s.device == "cuda" and recipe.train.host_optimizer:
        of_matrices = of_others = 0.0
    states = of_matrices * matrices + of_others * (embeds_here + head_here)
    sharded = [layout.data if layout.zero >= level else 1 for level in (1, 2, 3)]
    gathered = 0.0
    if layout.zero == 3:
        largest = max(sum(brick.weights for brick in layer) / 4 for layer in layers)
        # two layers at hand in the compute dtype, and the gradient of one before it is shared out
        gathered = largest * (2 * s.size + 4) + s.size * outside
        layers = [[_without_casts(brick) for brick in layer] for layer in layers]
    return Step(
        layers=layers, setting=s, hidden_size=whole.hidden_size, vocab_size=vocab, tied=tied,
        embeds=embeds_here, head=head_here, weights=weights / sharded[2], gradients=4.0 * total / sharded[1],
        optimizer=states / sharded[0], accumulates=accumulation > 1,
        recomputes=[recipe.train.recomputes(number * per_stage + i) for i in range(len(layers))],
        batch=BATCH * s.tokens * (accumulation if s.device == "cpu" else 1),
        in_flight=min(layout.pipeline - number, accumulation), gathered=gathered, last=last, norm=norm(whole, s),
        frozen=recipe.lora.rank > 0,
    )  # fmt: skip


def _shard(a: Architecture, layout: Layout) -> Architecture:
    """The architecture whose bricks are what one device has of each: heads, channels and experts divided."""
    t = layout.tensor
    shard = replace(
        a, num_attention_heads=a.num_attention_heads // t,
        num_key_value_heads=max(1, (a.num_key_value_heads or 1) // t),
        intermediate_size=-(-(a.intermediate_size or 0) // t),
        moe_intermediate_size=-(-(a.moe_intermediate_size or 0) // t),
        num_experts=a.num_experts // layout.expert,
    )  # fmt: skip
    shard.ssm_expand = a.ssm_expand / t  # type: ignore[assignment]  # the channels, as the formulas multiply them
    return shard


def _without_casts(brick: Brick) -> Brick:
    kept = brick.kept
    return brick._replace(kept=Kept(kept.saved, 0.0, 0.0, kept.extra))


def _divisor(devices: int, allowed: Callable[[int], bool]) -> int:
    """The largest divisor of the number of devices that is allowed."""
    return max((d for d in range(1, devices + 1) if devices % d == 0 and allowed(d)), default=1)
