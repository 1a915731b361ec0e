"""The memory of a training step over time: a walk through forward, loss, backward and optimizer, and its peak by part.

It knows what the loop in `training/loop.py` holds when: weights, gradients and optimizer states in fp32, gradients set
free after each step, the loss in chunks with its two gradients made in the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from moai_llm.architecture import Architecture
from moai_llm.optimization import LoraConfig
from moai_llm.planning.activations import CHANNEL_MIXERS, TOKEN_MIXERS, Kept, Setting, norm
from moai_llm.planning.adapters import Matrix, mixer_matrices, mlp_matrices, of_layer

PARTS = ("weights", "gradients", "optimizer", "activations", "loss")
BATCH = 28  # bytes a token of a batch: ids, labels and positions in 64 bits, document numbers in 32


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    loss: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


class Brick(NamedTuple):
    """A brick of a layer, with the norm before it: what it keeps, and the size of its parameters."""

    kept: Kept
    norm: Kept
    parameters: float  # that are trained
    largest: float  # the largest matrix that is trained
    weights: float  # bytes of all its parameters
    unpacked: float = 0.0  # bytes of the largest matrix that is there in another form while it is read


@dataclass(frozen=True)
class Step:
    """What one device does in a step; a parallel layout changes the numbers, not the walk."""

    layers: list[list[Brick]]
    setting: Setting
    hidden_size: int
    vocab_size: int
    tied: bool
    embeds: float  # parameters of the embedding on this device, where they are trained
    head: float  # parameters of an untied head, likewise
    weights: float  # bytes between steps
    gradients: float  # bytes once all are there
    optimizer: float
    accumulates: bool  # more than one micro-batch a step: gradients are there while a micro-batch runs
    recomputes: list[bool]  # of each layer
    batch: float  # bytes of the step's batches that lie on the device
    in_flight: int = 1  # micro-batches whose activations are kept at once
    gathered: float = 0.0  # weights fetched from other devices at once
    last: bool = True  # whether the head and the loss are on this device
    norm: Kept = Kept(0)
    frozen: bool = False  # below adapters


def peak(step: Step) -> Memory:
    """The moment with the most bytes."""
    return max(moments(step), key=lambda moment: moment.total)


def moments(step: Step) -> Iterator[Memory]:
    """The candidates for the peak: the end of the layers, the loss, the backward of each brick, the embedding, the
    optimizer.
    """
    s, h = step.setting, step.hidden_size
    tokens = s.tokens
    full = 4 * (step.embeds + step.head + sum(brick.parameters for layer in step.layers for brick in layer))
    scale = step.gradients / full if full else 0.0
    base = Memory(step.weights + step.gathered, 0.0, step.optimizer, step.batch + tokens * 9)
    held = [_held(layer, recomputed, step) for layer, recomputed in zip(step.layers, step.recomputes)]
    cached = sum(brick.kept.cached for layer, again in zip(step.layers, step.recomputes) if again for brick in layer)
    waiting = (step.in_flight - 1) * sum(held)
    live = sum(held) + waiting + (step.norm.saved if step.last else 0)
    done = full if step.accumulates else 0.0

    def at(activations: float, gradients: float, loss: float) -> Memory:
        return replace(
            base, activations=base.activations + activations, gradients=gradients * scale, loss=loss,
        )  # fmt: skip

    loss = 0.0
    yield at(live + cached, done, loss)
    if step.last:
        during, after = loss_bytes(step.vocab_size, h, s, frozen=step.frozen)
        yield at(live + cached + s.size * h * tokens, done, during)
        loss = after
        # the head's gradient is one of the gradients at once; a tied one waits for the embedding's
        if not step.tied and not step.frozen:
            loss -= 4.0 * step.vocab_size * h
            done = full if step.accumulates else 4.0 * step.vocab_size * h
        yield at(live + step.norm.extra + 4 * h * tokens, done, loss)
        live -= step.norm.saved
        loss -= s.size * h * tokens
    stream = 4.0 * h * tokens  # the gradient of the residual stream
    for layer, recomputed in reversed(list(zip(step.layers, step.recomputes))):
        live += _held(layer, False, step) - _held(layer, recomputed, step)  # what comes back when it is recomputed
        for brick in reversed(layer):
            fresh = (2 if s.half else 0) * brick.largest + (4 * brick.largest if step.accumulates else 0)
            fresh += brick.unpacked
            grown = 0.0 if step.accumulates else 4 * brick.largest
            yield at(live + stream + brick.kept.extra + fresh, done + grown, loss)
            if not step.accumulates:
                done += 4 * brick.parameters
            live -= brick.kept.saved + brick.kept.casts
            yield at(live + 2 * stream + brick.norm.extra, done, loss)
            live -= brick.norm.saved
    embedding = 4.0 * step.embeds
    yield at(waiting + stream, full if step.accumulates else done, loss + embedding)
    yield replace(base, activations=step.batch, gradients=step.gradients)


def _held(layer: list[Brick], recomputed: bool, step: Step) -> float:
    """Bytes of a layer between its forward and its backward; of one that is recomputed its input."""
    if recomputed:
        return 4.0 * step.hidden_size * step.setting.tokens
    return sum(brick.kept.saved + brick.kept.casts + brick.norm.saved for brick in layer)


def chunk_rows(vocab_size: int, device: str) -> int:
    """Rows of logits at a time; the same numbers as `default_chunk_rows` in ops/cross_entropy.py, which a test holds
    together.
    """
    budget, most = (2**28, 1024) if device == "cpu" else (2**30, 8192)
    return max(64, min(most, budget // (4 * vocab_size)))


def loss_bytes(vocab_size: int, h: int, s: Setting, *, frozen: bool = False) -> tuple[float, float]:
    """Bytes of the loss from hidden states while it runs, and kept until the backward: the gradients of the hidden
    states and, in fp32, of a head that is trained.
    """
    rows = min(chunk_rows(vocab_size, s.device), s.tokens)
    block = min(rows, max(1, 2**20 // vocab_size)) if s.device == "cpu" else rows
    kept = s.size * h * s.tokens + (0.0 if frozen else 4.0 * vocab_size * h)
    weight = 2.0 * vocab_size * h if s.half else 0.0
    logits = s.size * rows * vocab_size
    log_p = block * vocab_size * (8 if s.half and s.device == "cpu" else 4)
    product = 2.0 * vocab_size * h if s.half and not frozen else 0.0
    rows_read = s.size * h * s.tokens  # the rows with a target, picked out
    return kept + rows_read + weight + logits + max(log_p, product + s.size * rows * h), kept


def bricks(a: Architecture, s: Setting, lora: LoraConfig | None = None) -> list[list[Brick]]:
    """The layers of an architecture on one device, frozen below adapters where `lora` has a rank."""
    assert a.layer_types and a.mlp_layer_types
    pairs = list(zip(a.layer_types, a.mlp_layer_types))
    if lora is not None and lora.rank:
        return [_layer(a, replace(s, adapters=of_layer(lora, a, i)), *pair) for i, pair in enumerate(pairs)]
    kinds = {pair: _layer(a, s, *pair) for pair in set(pairs)}
    return [kinds[pair] for pair in pairs]


def _layer(a: Architecture, s: Setting, mixer: str, mlp: str) -> list[Brick]:
    if mixer not in TOKEN_MIXERS or mlp not in (*CHANNEL_MIXERS, "none"):
        raise ValueError(f"the activations of {mixer!r} with {mlp!r} are not known here")
    assert a.head_dim
    h, counts = a.hidden_size, a.brick_parameters()
    inner = a.ssm_expand * h if mixer == "linear_attention" else a.num_attention_heads * a.head_dim
    found = [(TOKEN_MIXERS[mixer](a, s), counts[mixer] + counts["norm"], h * inner, mixer_matrices(a, mixer))]
    if mlp != "none":
        width = (a.intermediate_size or 0) if mlp == "dense" else a.num_experts * (a.moe_intermediate_size or 0)
        largest = h * width * (2 if mlp == "sparse" and a.mlp_gated else 1)
        found.append((CHANNEL_MIXERS[mlp](a, s), counts[mlp] + counts["norm"], largest, mlp_matrices(a, mlp)))
    if s.adapters is None:
        return [Brick(kept, norm(a, s), count, largest, 4.0 * count) for kept, count, largest, _ in found]
    return [_frozen(Brick(kept, norm(a, s), 0, 0, 4.0 * count), s, matrices) for kept, count, _, matrices in found]


def _frozen(brick: Brick, s: Setting, matrices: list[Matrix]) -> Brick:
    """A brick whose own weights rest, in 4 bits or in 32, below adapters."""
    adapters = s.adapters
    assert adapters is not None
    trained = adapters.parameters(matrices)
    largest = max((adapters.rank * m.experts * max(m.inputs, m.outputs) for m in matrices if m.name in adapters.names),
                  default=0)  # fmt: skip
    packed = sum(m.size for m in matrices if adapters.packed(m))
    unpacked = 0.0
    for m in matrices:
        if m.experts > 1 and m.name in adapters.names:  # the gradient of the sum, then that of the adapter
            unpacked = max(unpacked, (6.0 if s.half else 4.0) * m.size)
        elif adapters.packed(m):
            unpacked = max(unpacked, float(s.size * m.size))
    weights = brick.weights - packed * (4 - adapters.bits / 8) + 4.0 * trained
    return brick._replace(parameters=trained, largest=largest, weights=weights, unpacked=unpacked)
