"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2), with document borders, and its single-token step.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t

Shapes: B batch, L time, D channels, N states. The state and every sum over it are fp32 (fp64 when the inputs are),
whatever the dtype of x, B and C. Where a document starts (`seq_idx` changes), h_{t-1} is taken as zero.

`reference` is the recurrence as written, `torch` walks the same recurrence in chunks and recomputes them in the
backward, `native` is C++ built for this CPU (selective_scan_native.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define

CHUNK = 16  # steps a chunk: its work buffers stay in the cache, and one state is kept per chunk for the backward


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a whole sequence.

    Args:
        x: (B, L, D) input.
        delta: (B, L, D) step sizes, already positive (after softplus).
        A: (D, N) negative decay rates.
        B, C: (B, L, N) input and output projections of each step.
        D: (D,) skip weight, or None for no skip.
        seq_idx: (B, L) integers; the state is reset wherever two neighbours differ.
        initial_state: (B, D, N) state before the first step; zero when None.
        return_final_state: also return the state after the last step.

    Returns:
        y (B, L, D) in the dtype of x, and with `return_final_state` the state (B, D, N) in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not agree.
    """
    _check(x, delta, A, B, C, D, seq_idx, initial_state)
    dtype = _state_dtype(x)
    # delta and the parameters carry the precision of the recurrence; x, B, C may stay in half precision
    delta, A = delta.to(dtype), A.to(dtype)
    D = torch.zeros(x.shape[2], dtype=dtype, device=x.device) if D is None else D.to(dtype)
    B, C = B.to(x.dtype), C.to(x.dtype)
    h0 = None if initial_state is None else initial_state.to(dtype)
    y, h = _scan(x, delta, A, B, C, D, document_starts(seq_idx), h0)
    return (y, h) if return_final_state else y


def document_starts(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) bool, true where a document starts inside the row. The first column is false: the row goes on from its
    state.
    """
    if seq_idx is None:
        return None
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def selective_scan_step(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One step of the recurrence for decoding; `state` (B, D, N) is updated in place.

    Args:
        state: (B, D, N) fp32. x, delta: (B, D). A: (D, N). B, C: (B, N). D: (D,) or None.

    Returns:
        y (B, D) in the dtype of x.
    """
    delta = delta.to(state.dtype)
    D = torch.zeros(x.shape[1], dtype=state.dtype, device=x.device) if D is None else D.to(state.dtype)
    return _step(x, state, delta, A.to(state.dtype), B.to(x.dtype), C.to(x.dtype), D)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    h0: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, length, channels), got {tuple(x.shape)}")
    b, l, d = x.shape
    n = A.shape[-1]
    want = {"delta": (delta, (b, l, d)), "A": (A, (d, n)), "B": (B, (b, l, n)), "C": (C, (b, l, n)), "D": (D, (d,)),
            "seq_idx": (seq_idx, (b, l)), "initial_state": (h0, (b, d, n))}  # fmt: skip
    for name, (tensor, shape) in want.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")


# ---------------------------------------------------------------- reference: the recurrence as it is written


def scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = delta.dtype
    h_BDN = x.new_zeros(x.shape[0], x.shape[2], A.shape[1], dtype=dtype) if h0 is None else h0
    xs, Bs, Cs = x.to(dtype).unbind(1), B.to(dtype).unbind(1), C.to(dtype).unbind(1)
    outputs = []
    for t, delta_BD in enumerate(delta.unbind(1)):
        if starts is not None:
            h_BDN = h_BDN.masked_fill(starts[:, t, None, None], 0)
        h_BDN = torch.exp(delta_BD[..., None] * A) * h_BDN + (delta_BD * xs[t])[..., None] * Bs[t][:, None, :]
        outputs.append((h_BDN * Cs[t][:, None, :]).sum(-1) + D * xs[t])
    return torch.stack(outputs, 1).to(x.dtype), h_BDN


def step_reference(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    state.mul_(torch.exp(delta[..., None] * A)).add_((delta * x)[..., None] * B[:, None, :])
    return torch.addcmul((state @ C[..., None].to(state.dtype)).squeeze(-1), D, x.to(state.dtype)).to(x.dtype)


# ---------------------------------------------------------------- torch: chunked, any device, recomputed in the
# backward


def _transposed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Swap batch and time into a contiguous tensor of this dtype, in one pass."""
    return t.new_empty((t.shape[1], t.shape[0], t.shape[2]), dtype=dtype).copy_(t.transpose(0, 1))


def _chunk_states(a: Tensor, h: Tensor, x: Tensor, delta: Tensor, At: Tensor, B: Tensor, starts: Tensor | None) -> None:
    """Fill a (k,B,N,D) with the decays and h[1:] (k,B,N,D) with the states of one chunk, from h[0]."""
    k = x.shape[0]
    torch.mul(delta[:, :, None, :], At, out=a[:k])
    a[:k].exp_()
    if starts is not None:
        a[:k].masked_fill_(starts[..., None, None], 0)
    torch.mul((delta * x)[:, :, None, :], B[..., None], out=h[1 : k + 1])
    hs, decays = h.unbind(0), a.unbind(0)
    for i in range(k):
        hs[i + 1].addcmul_(decays[i], hs[i])


def _chunks_with_starts(starts: Tensor | None, chunks: int) -> list[Tensor | None]:
    """Per chunk its (k, B) mask of document starts, or None where it has none: only those chunks pay for it."""
    if starts is None:
        return [None] * chunks
    pieces = starts.transpose(0, 1).split(CHUNK)
    some = torch.stack([piece.any() for piece in pieces]).tolist()
    return [piece if any_ else None for piece, any_ in zip(pieces, some)]


@torch.library.custom_op("moai::selective_scan_chunked", mutates_args=())
def _chunked_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    h0: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, final state (B, D, N), and with `save` the state before each chunk (chunks, B, N, D)."""
    (b, l, d), n, dtype = x.shape, A.shape[1], delta.dtype
    xt, dt, Bt, Ct = (_transposed(t, dtype) for t in (x, delta, B, C))
    At = A.t().contiguous()
    chunks = -(-l // CHUNK)
    masks = _chunks_with_starts(starts, chunks)
    a, h = x.new_empty(CHUNK, b, n, d, dtype=dtype), x.new_empty(CHUNK + 1, b, n, d, dtype=dtype)
    h[0] = 0 if h0 is None else h0.transpose(1, 2)
    kept = x.new_empty(chunks if save else 0, b, n, d, dtype=dtype)
    y = x.new_empty(l, b, d, dtype=dtype)
    for c in range(chunks):
        s = slice(c * CHUNK, min((c + 1) * CHUNK, l))
        k = s.stop - s.start
        if save:
            kept[c] = h[0]
        _chunk_states(a, h, xt[s], dt[s], At, Bt[s], masks[c])
        torch.bmm(Ct[s].reshape(k * b, 1, n), h[1 : k + 1].view(k * b, n, d), out=y[s].view(k * b, 1, d))
        h[0] = h[k]
    y.addcmul_(xt, D)
    return _transposed(y, x.dtype), h[0].transpose(1, 2).contiguous(), kept


@_chunked_forward.register_fake
def _(x, delta, A, B, C, D, starts, h0, save):  # type: ignore[no-untyped-def]
    (b, l, d), n = x.shape, A.shape[1]
    kept = x.new_empty(-(-l // CHUNK) if save else 0, b, n, d, dtype=delta.dtype)
    return x.new_empty(b, l, d), x.new_empty(b, d, n, dtype=delta.dtype), kept


@torch.library.custom_op("moai::selective_scan_chunked_backward", mutates_args=())
def _chunked_backward(
    gy: Tensor, gh: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D and of the initial state, from those of y and of the final state."""
    (b, l, d), n, dtype = x.shape, A.shape[1], delta.dtype
    xt, dt, Bt, Ct, gt = (_transposed(t, dtype) for t in (x, delta, B, C, gy))
    At = A.t().contiguous()
    masks = _chunks_with_starts(starts, kept.shape[0])
    shape = (CHUNK, b, n, d)
    a, q, w = (x.new_empty(shape, dtype=dtype) for _ in range(3))
    h = x.new_empty(CHUNK + 1, b, n, d, dtype=dtype)
    gx, gdelta = torch.empty_like(xt), torch.empty_like(dt)
    gB, gC, gA = torch.empty_like(Bt), torch.empty_like(Ct), torch.zeros_like(At)
    carry = x.new_zeros(b, n, d, dtype=dtype) if gh is None else gh.to(dtype).transpose(1, 2).contiguous()
    for c in range(kept.shape[0] - 1, -1, -1):
        s = slice(c * CHUNK, min((c + 1) * CHUNK, l))
        k = s.stop - s.start
        xs, ds, Bs, Cs, gs = xt[s], dt[s], Bt[s], Ct[s], gt[s]
        h[0] = kept[c]
        _chunk_states(a, h, xs, ds, At, Bs, masks[c])
        torch.bmm(h[1 : k + 1].view(k * b, n, d), gs.view(k * b, d, 1), out=gC[s].view(k * b, n, 1))
        # q_t = dL/dh_t = C_t g_t + a_{t+1} q_{t+1}, from the last step of the chunk to its first
        torch.mul(gs[:, :, None, :], Cs[..., None], out=q[:k])
        qs, decays = q.unbind(0), a.unbind(0)
        qs[k - 1].add_(carry)
        for i in range(k - 2, -1, -1):
            qs[i].addcmul_(decays[i + 1], qs[i + 1])
        torch.mul(decays[0], qs[0], out=carry)
        rows = q[:k].view(k * b, n, d)
        torch.bmm(rows, (ds * xs).view(k * b, d, 1), out=gB[s].view(k * b, n, 1))
        sum_qB = torch.bmm(Bs.reshape(k * b, 1, n), rows).view(k, b, d)
        q[:k].mul_(a[:k]).mul_(h[:k])  # dL/d(delta_t A): q_t a_t h_{t-1}
        gA.add_(torch.mul(q[:k], ds[:, :, None, :], out=w[:k]).sum((0, 1)))
        sum_qA = torch.mul(q[:k], At, out=w[:k]).sum(2)
        torch.mul(gs, D, out=gx[s])
        gx[s].addcmul_(sum_qB, ds)
        torch.addcmul(sum_qA, sum_qB, xs, out=gdelta[s])
    gD = (gt * xt).sum((0, 1))
    return (_transposed(gx, x.dtype), _transposed(gdelta, dtype), gA.t().contiguous(), _transposed(gB, B.dtype),
            _transposed(gC, C.dtype), gD, carry.transpose(1, 2).contiguous())  # fmt: skip


@_chunked_backward.register_fake
def _(gy, gh, x, delta, A, B, C, D, starts, kept):  # type: ignore[no-untyped-def]
    return (
        *(torch.empty_like(t) for t in (x, delta, A, B, C, D)),
        x.new_empty(x.shape[0], *A.shape, dtype=delta.dtype),
    )


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, delta, A, B, C, D, starts, h0, _ = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, starts, output[2])
    ctx.has_state = h0 is not None


def scan_gradients(backward):  # type: ignore[no-untyped-def]
    """The autograd formula shared by the custom ops of this signature: `backward` computes all gradients at once."""

    def formula(ctx, gy, gh, _):  # type: ignore[no-untyped-def]
        x, delta, A, B, C, D, starts, kept = ctx.saved_tensors
        *grads, gh0 = backward(gy, gh, x, delta, A, B, C, D, starts, kept)
        return (*grads, None, gh0 if ctx.has_state else None, None)

    return formula


_chunked_forward.register_autograd(scan_gradients(_chunked_backward), setup_context=_save_for_backward)


def needs_backward(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def scan_chunked(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, h, _ = _chunked_forward(x, delta, A, B, C, D, starts, h0, needs_backward(x, delta, A, B, C, D, h0))
    return y, h


_NATIVE = (torch.float32, torch.bfloat16)
_scan = define(
    "selective_scan",
    {
        "reference": Implementation(scan_reference),
        "torch": Implementation(scan_chunked),
        "native": Implementation("moai_llm.ops.selective_scan_native:scan_native", dtypes=_NATIVE),
    },
    order={"cpu": ["native", "torch"], "any": ["torch"]},
)
_step = define(
    "selective_scan_step",
    {
        "reference": Implementation(step_reference),
        "native": Implementation("moai_llm.ops.selective_scan_native:step_native", dtypes=_NATIVE),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
