"""Bytes that each brick keeps from its forward to its backward, and holds beyond that while its backward runs.

The formulas follow the code in `modeling/` and `ops/`, tensor by tensor: a brick that changes there changes here, and
tests/planning/test_activations.py compares the kept bytes with what autograd saves. Per token of a micro-batch:
h width of the model, c bytes of the compute dtype; the residual stream, norms, router and scan are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moai_llm.architecture import Architecture
from moai_llm.planning.adapters import Adapters, Matrix, mixer_matrices, mlp_matrices

SCAN_CHUNK = {"cpu": 32, "cuda": 16}  # steps between two kept states: the C++ scan, the one in PyTorch
RESULT_ONLY = ("relu", "sigmoid", "tanh")  # activations whose backward needs their result, not their input


@dataclass(frozen=True)
class Setting:
    """One micro-batch on one kind of device."""

    rows: int
    seq_len: int
    half: bool  # bf16 or fp16 autocast
    device: str  # cpu | cuda: which implementation of an op runs
    documents: float = 1.0  # documents in a row
    adapters: Adapters | None = None  # of the layer, where its weights are frozen

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.half else 4

    def readers(self, *names: str) -> int:
        """How many of these matrices need what they read for a gradient: trained themselves, or by an adapter."""
        return sum(self.adapters is None or name in self.adapters.names for name in names)


@dataclass(frozen=True)
class Kept:
    """Bytes of one brick of one layer and micro-batch."""

    saved: float  # activations kept for the backward
    casts: float = 0.0  # half-precision copies of its weights, kept likewise
    cached: float = 0.0  # those of them that autocast caches until the end of the forward, whatever is recomputed
    extra: float = 0.0  # held beyond that at the worst moment of its backward


def norm(a: Architecture, s: Setting) -> Kept:
    """A norm of the residual stream: its input and 1/rms (mean and 1/deviation); its output belongs to who reads it."""
    h, layer = a.hidden_size, a.norm_type == "layer_norm"
    fused = layer or s.device == "cuda"
    # the gradient in fp32 and in its own dtype, the result; unfused also the normed input and a product
    extra = (4 if s.half else 0) + s.size + 4 + (0 if fused else 8)
    return Kept(s.tokens * (4 * h + (8 if layer else 4)), extra=s.tokens * extra * h)


def _normed(a: Architecture, s: Setting, readers: int) -> float:
    """Bytes a token of a norm's output, as `readers` linear layers keep it: LayerNorm leaves autocast in fp32, so each
    of them casts it for itself.
    """
    copies = readers if a.norm_type == "layer_norm" and s.half else min(readers, 1)
    return copies * s.size * a.hidden_size


def attention(a: Architecture, s: Setting, window: int | None = None) -> Kept:
    assert a.head_dim and a.num_key_value_heads
    c, heads, groups = s.size, a.num_attention_heads, a.num_key_value_heads
    q, k = heads * a.head_dim, groups * a.head_dim
    cuda, norms, rotates = s.device == "cuda", a.use_qk_norm, a.position_embedding == "rope"
    narrow = window is not None and window < s.seq_len
    kept = _normed(a, s, s.readers("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"))
    kept += c * (q + k) * (1 + norms + (cuda and rotates))  # each step on q and k keeps what it read
    kept += c * k + c * q + 4 * heads + 4 * (heads + groups) * norms  # values, result, log-sum-exp, 1/rms
    pieces = not cuda and (s.documents > 1 or narrow)
    if pieces and s.readers("mixer.o_proj"):
        kept += c * q  # the joined pieces, which o_proj reads
    if not cuda and narrow and window is not None:
        kept += c * _block_masks(s.seq_len / s.documents, window)
    if cuda:
        kept += c * s.seq_len  # one device hands borders to torch as a mask, (rows, L, L)
    # the worst moment: gradients of q, k, v beside all that was kept, or the backward of the norm of q in fp32
    flash = c * q + c * (q + 2 * k) * (2 if pieces else 1) - c * q * pieces
    after_norm = (q * ((16 if s.half else 12) + c) - c * (3 * q + 3 * k)) if norms and not cuda else 0.0
    extra = max(flash, after_norm) + c * a.hidden_size
    return _with_weights(s, s.tokens * kept, s.tokens * extra, mixer_matrices(a, "full_attention"))


def _block_masks(length: float, window: int) -> float:
    """Mask entries a token of a document: each block of `window` queries but the first sees window - 1 keys more."""
    blocks, left = divmod(max(0.0, length - window), window)
    return (blocks * window * (2 * window - 1) + left * (left + window - 1)) / length


def mamba(a: Architecture, s: Setting) -> Kept:
    assert a.ssm_dt_rank
    h, d, n, r = a.hidden_size, a.ssm_expand * a.hidden_size, a.ssm_state_size, a.ssm_dt_rank
    c, taps, chunk = s.size, a.conv_kernel_size - 1, SCAN_CHUNK[s.device]
    chunks = -(-s.seq_len // chunk)
    kept = _normed(a, s, s.readers("mixer.in_proj_x", "mixer.in_proj_z"))
    trained = s.adapters is None
    # the convolution's input and its shifted copies, for its weight; before and after SiLU
    kept += c * d * ((1 + taps) * trained + 2) + taps
    kept += c * (r + 2 * n) * (2 if a.ssm_norm else 1) + (12 if a.ssm_norm else 0)
    kept += 2 * 4 * d + 1  # delta before and after softplus, where documents start
    kept += c * d * (3 + min(1, s.readers("mixer.out_proj")))  # y, z, silu(z) and their product
    states = 4 * n * d * chunks * s.rows
    conv = 2 * (d * (taps + 1)) if s.half else 0
    kept = s.tokens * kept + states + 8 * d * n + conv
    return _with_weights(s, kept, s.tokens * (2 * c * d + c * h), mixer_matrices(a, "linear_attention"))


def dense(a: Architecture, s: Setting) -> Kept:
    assert a.intermediate_size
    f = a.intermediate_size
    readers = s.readers(*(["mlp.gate_proj"] if a.mlp_gated else []), "mlp.up_proj")
    kept = _normed(a, s, readers) + s.size * f * (_widths(a) - (not s.readers("mlp.down_proj")))
    extra = s.size * (f * (2 if a.mlp_gated else 1) + a.hidden_size)
    return _with_weights(s, s.tokens * kept, s.tokens * extra, mlp_matrices(a, "dense"))


def sparse(a: Architecture, s: Setting) -> Kept:
    """Dropless: K rows a token, whichever experts they fall on."""
    assert a.moe_intermediate_size
    h, f, e, k, c = a.hidden_size, a.moe_intermediate_size, a.num_experts, a.num_experts_per_tok, s.size
    trained = s.adapters is None
    router = 4 * h * trained + 8 * e + 8 * a.router_noise * e + 8 * k + (4 + 4 * k) * a.norm_topk_prob + 8
    order = 16 * k + 8 * k * a.mlp_bias
    up, down = s.readers("mlp.up_proj"), s.readers("mlp.down_proj")
    # what an activation read stays, as gate and up are one tensor
    inside = (4 if a.mlp_gated else _widths(a)) - (not down)
    rows = k * (c * h * up + c * f * inside + c * h) + c * k  # gathered, inside, their results, the router's weights
    # gradients inside an expert, or of its results and, before they are summed, of the router's weights
    extra = k * c * max(f * (2 if a.mlp_gated else 1), 2 * h) + (c * h if s.half else 0)
    kept, matrices = s.tokens * (router + order + rows), mlp_matrices(a, "sparse")
    if s.adapters is None:
        return Kept(kept, 2.0 * e * (3 if a.mlp_gated else 2) * h * f if s.half else 0.0, 0.0, s.tokens * extra)
    return _with_weights(s, kept, s.tokens * extra, matrices)


def _widths(a: Architecture) -> int:
    """How many tensors as wide as the inside of an MLP are kept: before and after the activation, and of a gated one
    what it multiplies and the product.
    """
    inputs = 0 if a.hidden_act in RESULT_ONLY else 1
    return inputs + (3 if a.mlp_gated else 1)


def _with_weights(s: Setting, kept: float, extra: float, matrices: list[Matrix]) -> Kept:
    """A brick with what its matrices add: half-precision copies, which autocast caches of trained weights only; of
    frozen ones in 4 bits none, and of adapters what lies between their two.
    """
    if s.adapters is None:
        casts = 2.0 * sum(m.size for m in matrices) if s.half else 0.0
        return Kept(kept, casts, casts, extra)
    casts = cached = 0.0
    for m in matrices:
        if m.name not in s.adapters.names:
            casts += 2.0 * m.size * (s.half and not s.adapters.packed(m))
        elif m.experts > 1:  # the sum of weight and adapter is kept
            casts += s.size * m.size
        else:
            kept += s.size * s.adapters.rank * s.tokens
            casts += 2.0 * m.size * (s.half and not s.adapters.packed(m))
            cached += 2.0 * s.adapters.rank * (m.inputs + m.outputs) * s.half
    return Kept(kept, casts + cached, cached, extra)


TOKEN_MIXERS: dict[str, Callable[[Architecture, Setting], Kept]] = {
    "full_attention": attention,
    "sliding_attention": lambda a, s: attention(a, s, a.sliding_window),
    "linear_attention": mamba,
}
CHANNEL_MIXERS: dict[str, Callable[[Architecture, Setting], Kept]] = {"dense": dense, "sparse": sparse}
