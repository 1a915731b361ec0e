"""Bytes that each brick keeps from its forward to its backward, and holds beyond that while its backward runs.

The formulas follow the code in `modeling/` and `ops/`, tensor by tensor: a brick that changes there changes here, and
tests/planning/test_activations.py compares the kept bytes with what autograd saves. Per token of a micro-batch:
h width of the model, c bytes of the compute dtype; the residual stream, norms, router and scan are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moai_llm.architecture import Architecture

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

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.half else 4


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
    copies = readers if a.norm_type == "layer_norm" and s.half else 1
    return copies * s.size * a.hidden_size


def attention(a: Architecture, s: Setting, window: int | None = None) -> Kept:
    assert a.head_dim and a.num_key_value_heads
    c, heads, groups = s.size, a.num_attention_heads, a.num_key_value_heads
    q, k = heads * a.head_dim, groups * a.head_dim
    cuda, norms, rotates = s.device == "cuda", a.use_qk_norm, a.position_embedding == "rope"
    narrow = window is not None and window < s.seq_len
    kept = _normed(a, s, 3)
    kept += c * (q + k) * (1 + norms + (cuda and rotates))  # each step on q and k keeps what it read
    kept += c * k + c * q + 4 * heads + 4 * (heads + groups) * norms  # values, result, log-sum-exp, 1/rms
    pieces = not cuda and (s.documents > 1 or narrow)
    if pieces:
        kept += c * q  # the joined pieces, which o_proj reads
    if not cuda and narrow and window is not None:
        kept += c * _block_masks(s.seq_len / s.documents, window)
    if cuda:
        kept += c * s.seq_len  # one device hands borders to torch as a mask, (rows, L, L)
    # the worst moment: gradients of q, k, v beside all that was kept, or the backward of the norm of q in fp32
    flash = c * q + c * (q + 2 * k) * (2 if pieces else 1) - c * q * pieces
    after_norm = (q * ((16 if s.half else 12) + c) - c * (3 * q + 3 * k)) if norms and not cuda else 0.0
    extra = max(flash, after_norm) + c * a.hidden_size
    matrices = a.hidden_size * (2 * q + 2 * k)
    return Kept(s.tokens * kept, *_casts(s, matrices), s.tokens * extra)


def _block_masks(length: float, window: int) -> float:
    """Mask entries a token of a document: each block of `window` queries but the first sees window - 1 keys more."""
    blocks, left = divmod(max(0.0, length - window), window)
    return (blocks * window * (2 * window - 1) + left * (left + window - 1)) / length


def mamba(a: Architecture, s: Setting) -> Kept:
    assert a.ssm_dt_rank
    h, d, n, r = a.hidden_size, a.ssm_expand * a.hidden_size, a.ssm_state_size, a.ssm_dt_rank
    c, taps, chunk = s.size, a.conv_kernel_size - 1, SCAN_CHUNK[s.device]
    chunks = -(-s.seq_len // chunk)
    kept = _normed(a, s, 2)
    kept += c * d * (1 + taps + 2) + taps  # the convolution's input, its shifted copies, before and after SiLU
    kept += c * (r + 2 * n) * (2 if a.ssm_norm else 1) + (12 if a.ssm_norm else 0)
    kept += 2 * 4 * d + 1  # delta before and after softplus, where documents start
    kept += 4 * c * d  # y, z, silu(z) and their product
    states = 4 * n * d * chunks * s.rows
    matrices = 3 * h * d + d * (r + 2 * n) + r * d
    casts, cached = _casts(s, matrices)
    conv = 2 * (d * (taps + 1)) if s.half else 0
    return Kept(s.tokens * kept + states + 8 * d * n, casts + conv, cached, s.tokens * (2 * c * d + c * h))


def dense(a: Architecture, s: Setting) -> Kept:
    assert a.intermediate_size
    f, matrices = a.intermediate_size, 3 if a.mlp_gated else 2
    kept = _normed(a, s, matrices - 1) + s.size * f * _widths(a)
    extra = s.size * (f * (2 if a.mlp_gated else 1) + a.hidden_size)
    return Kept(s.tokens * kept, *_casts(s, matrices * a.hidden_size * f), s.tokens * extra)


def sparse(a: Architecture, s: Setting) -> Kept:
    """Dropless: K rows a token, whichever experts they fall on."""
    assert a.moe_intermediate_size
    h, f, e, k, c = a.hidden_size, a.moe_intermediate_size, a.num_experts, a.num_experts_per_tok, s.size
    router = 4 * h + 8 * e + 8 * a.router_noise * e + 8 * k + (4 + 4 * k) * a.norm_topk_prob + 8
    order = 16 * k + 8 * k * a.mlp_bias
    inside = 4 if a.mlp_gated else _widths(a)  # what an activation read stays, as gate and up are one tensor
    rows = k * (c * h + c * f * inside + c * h) + c * k  # gathered, inside, their results, the router's weights
    # gradients inside an expert, or of its results and, before they are summed, of the router's weights
    extra = k * c * max(f * (2 if a.mlp_gated else 1), 2 * h) + (c * h if s.half else 0)
    weights = e * (3 if a.mlp_gated else 2) * h * f
    casts = 2.0 * weights if s.half else 0.0
    return Kept(s.tokens * (router + order + rows), casts, 0.0, s.tokens * extra)


def _widths(a: Architecture) -> int:
    """How many tensors as wide as the inside of an MLP are kept: before and after the activation, and of a gated one
    what it multiplies and the product.
    """
    inputs = 0 if a.hidden_act in RESULT_ONLY else 1
    return inputs + (3 if a.mlp_gated else 1)


def _casts(s: Setting, parameters: int) -> tuple[float, float]:
    size = 2.0 * parameters if s.half else 0.0
    return size, size


TOKEN_MIXERS: dict[str, Callable[[Architecture, Setting], Kept]] = {
    "full_attention": attention,
    "sliding_attention": lambda a, s: attention(a, s, a.sliding_window),
    "linear_attention": mamba,
}
CHANNEL_MIXERS: dict[str, Callable[[Architecture, Setting], Kept]] = {"dense": dense, "sparse": sparse}
