"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2), with document borders, and its single-token step.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t

Shapes: B batch, L time, D channels, N states. The state and every sum over it are fp32 (fp64 when the inputs are),
whatever the dtype of x, B and C. Where a document starts (`seq_idx` changes), h_{t-1} is taken as zero.

`reference` is the recurrence as written, `torch` walks the same recurrence in chunks and recomputes them in the
backward, `native` is C++ built for this CPU (selective_scan_native.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define

CHUNK = 16  # steps a chunk; one state is kept per chunk for the backward
CACHED = 2**15  # elements of the state a thread walks together: the work buffers of a chunk then stay in its caches


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
    check_shapes(x, delta, A, B, C, D, seq_idx, initial_state)
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
    dtype = state.dtype
    D = torch.zeros(x.shape[1], dtype=dtype, device=x.device) if D is None else _cast(D, dtype)
    return _step(x, state, _cast(delta, dtype), _cast(A, dtype), _cast(B, x.dtype), _cast(C, x.dtype), D)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)  # `to` takes a microsecond even where it does nothing


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_shapes(
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
    y = (state * C[:, None, :]).sum(-1)  # not a matrix product, which autocast would make in half precision
    return torch.addcmul(y, D, x.to(state.dtype)).to(x.dtype)


# ---------------------------------------------------------------- torch: in chunks, on any device


LOG2E = 1.4426950408889634  # decays are powers of two here: on a CPU torch.exp2 is up to three times as fast as exp


def _take(t: Tensor, steps: slice, buffer: Tensor) -> Tensor:
    """Some steps of (B, L, ...) as (k, B, ...), in a buffer of its dtype: fresh tensors would cost page faults."""
    return buffer[: steps.stop - steps.start].copy_(t[:, steps].transpose(0, 1))


class _Work:
    """Work buffers of a chunk of some rows: decays (K, B, N, D), and states (K + 1, B, N, D) from the one before it on.

    `decay` and `state` are their steps, taken apart once: to make a view takes as long as a small product.
    """

    def __init__(self, like: Tensor, rows: int, states: int, channels: int) -> None:
        self.decays = like.new_empty(CHUNK, rows, states, channels)
        self.states = like.new_empty(CHUNK + 1, rows, states, channels)
        self.decay, self.state = self.decays.unbind(0), self.states.unbind(0)

    def walk(self, dx: Tensor, delta: Tensor, rates: Tensor, B: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fill both from state[0]; rates = A^T log2 e. -> decays and states (k, B, N, D) of the k steps."""
        k = dx.shape[0]
        decays, states = self.decays[:k], self.states[1 : k + 1]
        torch.mul(delta[:, :, None, :], rates, out=decays).exp2_()
        if starts is not None:
            decays.masked_fill_(starts[..., None, None], 0)
        torch.mul(dx[:, :, None, :], B[..., None], out=states)
        for i in range(k):
            self.state[i + 1].addcmul_(self.decay[i], self.state[i])
        return decays, states


def _chunks(length: int) -> list[slice]:
    return [slice(t, min(t + CHUNK, length)) for t in range(0, length, CHUNK)]


def _row_groups(x: Tensor, states: int) -> list[slice]:
    """Rows of the batch to walk together: on a CPU no more than keep the work buffers of a chunk in its caches."""
    rows, _, channels = x.shape
    together = max(1, CACHED * torch.get_num_threads() // (channels * states)) if x.device.type == "cpu" else rows
    return [slice(b, min(b + together, rows)) for b in range(0, rows, together)]


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
    rates = (A * LOG2E).t().contiguous()
    y, last = x.new_empty(b, l, d), x.new_empty(b, d, n, dtype=dtype)
    kept = x.new_empty(len(_chunks(l)) if save else 0, b, n, d, dtype=dtype)
    for r in _row_groups(x, n):
        work = _Work(delta, r.stop - r.start, n, d)
        work.states[0] = 0 if h0 is None else h0[r].transpose(1, 2)
        _forward_rows(
            work, x[r], delta[r], rates, B[r], C[r], D, None if starts is None else starts[r], y[r], kept[:, r]
        )
        last[r] = work.state[0].transpose(1, 2)
    return y, last, kept


def _forward_rows(
    work: _Work,
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    y: Tensor,
    kept: Tensor,
) -> None:
    """Fill y and kept. work.state[0] is the state before the first step, and then the one after the last."""
    (b, l, d), n = x.shape, rates.shape[0]
    x_k, d_k, dx_k, y_k = rates.new_empty(4, CHUNK, b, d)
    B_k, C_k = rates.new_empty(2, CHUNK, b, n)
    chunks = _chunks(l)
    masks = _chunks_with_starts(starts, len(chunks))
    for c, s in enumerate(chunks):
        k = s.stop - s.start
        xs, ds, Bs, Cs = _take(x, s, x_k), _take(delta, s, d_k), _take(B, s, B_k), _take(C, s, C_k)
        if len(kept):
            kept[c] = work.state[0]
        _, hs = work.walk(torch.mul(ds, xs, out=dx_k[:k]), ds, rates, Bs, masks[c])
        torch.bmm(Cs.view(k * b, 1, n), hs.view(k * b, n, d), out=y_k[:k].view(k * b, 1, d))
        y[:, s] = y_k[:k].addcmul_(xs, D).transpose(0, 1)
        work.state[0].copy_(work.state[k])


@torch.library.custom_op("moai::selective_scan_chunked_backward", mutates_args=())
def _chunked_backward(
    gy: Tensor, gh: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    starts: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D and of the initial state, from those of y and of the final state."""
    (b, _, d), n = x.shape, A.shape[1]
    At = A.t().contiguous()
    gx, gdelta, gB, gC = (t.new_empty(t.shape) for t in (x, delta, B, C))
    gA, gD, gh0 = torch.zeros_like(At), torch.zeros_like(D), delta.new_empty(b, d, n)
    for r in _row_groups(x, n):
        borders = None if starts is None else starts[r]
        carry = delta.new_zeros(r.stop - r.start, n, d)
        if gh is not None:
            carry.copy_(gh[r].transpose(1, 2))
        given = (gy[r], x[r], delta[r], At, B[r], C[r], D, borders, kept[:, r])
        _backward_rows(*given, carry, gx[r], gdelta[r], gA, gB[r], gC[r], gD)
        gh0[r] = carry.transpose(1, 2)
    return gx, gdelta, gA.t().contiguous(), gB, gC, gD, gh0


def _backward_rows(
    gy: Tensor, x: Tensor, delta: Tensor, At: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None,
    kept: Tensor, carry: Tensor, gx: Tensor, gdelta: Tensor, gA: Tensor, gB: Tensor, gC: Tensor, gD: Tensor,
) -> None:  # fmt: skip
    """Fill or add to the gradients. carry is that of the state after the last step, and then before the first."""
    (b, l, d), n = x.shape, At.shape[0]
    work, q = _Work(At, b, n, d), At.new_empty(CHUNK, b, n, d)
    x_k, d_k, dx_k, gy_k, qB_k, wA_k = At.new_empty(6, CHUNK, b, d)
    B_k, C_k, sum_k = At.new_empty(3, CHUNK, b, n)
    gA_k, gD_k, rates = torch.empty_like(At), torch.empty_like(D), At * LOG2E
    chunks = _chunks(l)
    masks = _chunks_with_starts(starts, len(chunks))
    for c, s in reversed(list(enumerate(chunks))):
        k = s.stop - s.start
        xs, ds, gs = _take(x, s, x_k), _take(delta, s, d_k), _take(gy, s, gy_k)
        Bs, Cs = _take(B, s, B_k), _take(C, s, C_k)
        dx, qs, qB, wA, sums = torch.mul(ds, xs, out=dx_k[:k]), q[:k], qB_k[:k], wA_k[:k], sum_k[:k]
        work.state[0].copy_(kept[c])
        w, hs = work.walk(dx, ds, rates, Bs, masks[c])
        # the vector from the left: from the right the same product is ten times slower on a CPU
        torch.bmm(gs.view(k * b, 1, d), hs.view(k * b, n, d).transpose(1, 2), out=sums.view(k * b, 1, n))
        gC[:, s] = sums.transpose(0, 1)
        # q_t = dL/dh_t = C_t g_t + a_{t+1} q_{t+1}, from the last step of the chunk to its first; a_t becomes a_t q_t
        products = gs[:, :, None, :].unbind(0), Cs[..., None].unbind(0), qs.unbind(0)
        for i, (g_t, C_t, q_t) in reversed(list(enumerate(zip(*products)))):
            torch.addcmul(carry if i == k - 1 else work.decay[i + 1], g_t, C_t, out=q_t)
            work.decay[i].mul_(q_t)
        carry.copy_(work.decay[0])
        torch.bmm(dx.view(k * b, 1, d), qs.view(k * b, n, d).transpose(1, 2), out=sums.view(k * b, 1, n))
        gB[:, s] = sums.transpose(0, 1)
        torch.bmm(Bs.view(k * b, 1, n), qs.view(k * b, n, d), out=qB.view(k * b, 1, d))
        w.mul_(work.states[:k])  # dL/d(delta_t A) = q_t a_t h_{t-1}
        gA.add_(torch.sum(torch.mul(w, ds[:, :, None, :], out=qs), (0, 1), out=gA_k))
        torch.sum(torch.mul(w, At, out=qs), 2, out=wA)
        gdelta[:, s] = wA.addcmul_(qB, xs).transpose(0, 1)
        gx[:, s] = qB.mul_(ds).addcmul_(gs, D).transpose(0, 1)
        gD.add_(torch.sum(gs.mul_(xs), (0, 1), out=gD_k))


def register_scan(forward: Any, backward: Any, chunk: int) -> None:
    """Make a pair of custom ops with the two signatures above differentiable, and traceable by torch.compile.

    `chunk` is the number of steps between two states that `forward` keeps for `backward`.
    """

    def forward_shapes(x, delta, A, B, C, D, starts, h0, save):
        (b, l, d), n = x.shape, A.shape[1]
        kept = x.new_empty(-(-l // chunk) if save else 0, b, n, d, dtype=delta.dtype)
        return x.new_empty(b, l, d), x.new_empty(b, d, n, dtype=delta.dtype), kept

    def backward_shapes(gy, gh, x, delta, A, B, C, D, starts, kept):
        gradients = [t.new_empty(t.shape) for t in (x, delta, A, B, C, D)]
        return *gradients, x.new_empty(x.shape[0], *A.shape, dtype=delta.dtype)

    def save_for_backward(ctx, inputs, output):
        x, delta, A, B, C, D, starts, h0, _ = inputs
        ctx.save_for_backward(x, delta, A, B, C, D, starts, output[2])
        ctx.has_state = h0 is not None

    def gradients(ctx, gy, gh, _):
        x, delta, A, B, C, D, starts, kept = ctx.saved_tensors
        *grads, gh0 = backward(gy, gh, x, delta, A, B, C, D, starts, kept)
        return (*grads, None, gh0 if ctx.has_state else None, None)

    forward.register_fake(forward_shapes)
    backward.register_fake(backward_shapes)
    forward.register_autograd(gradients, setup_context=save_for_backward)


register_scan(_chunked_forward, _chunked_backward, CHUNK)


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
