"""Contrastive losses against their formulas in fp64, pooling against one text at a time, equal meanings, gathering."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.contrastive import info_nce, meanings, pair_margin
from moai_llm.ops.gather import gather_rows
from moai_llm.ops.pooling import keyed_dropout, pool_documents

SIZES = [(1, 1), (3, 7), (13, 5), (7, 31)]


def masks(n: int, m: int, several: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + m)
    positive = torch.zeros(n, m, dtype=torch.bool)
    positive[torch.arange(n), torch.randint(m, (n,), generator=generator)] = True
    if several:
        positive |= torch.rand(n, m, generator=generator) < 0.3
        positive[-1] = positive[-1] if n == 1 else False  # a query without a right answer
    excluded = (torch.rand(n, m, generator=generator) < 0.2) & ~positive
    return positive, excluded


def reference(scores: Tensor, positive: Tensor, excluded: Tensor, margin: float, scale: float, inside: bool) -> Tensor:
    """One query and one right answer at a time, by the letter of the papers."""
    rows = []
    for s, right, out in zip(scores, positive.tolist(), excluded.tolist()):
        answers = [j for j, is_right in enumerate(right) if is_right]
        if not answers:
            rows.append(s.sum() * 0)
            continue
        limit = max(s[j].item() for j in answers) + margin
        kept = [j for j in range(len(s)) if j in answers or not (out[j] or s[j].item() > limit)]
        total = sum(torch.exp(scale * s[j]) for j in kept)
        shares = [torch.exp(scale * s[j]) / total for j in answers]
        if inside:
            rows.append(-torch.log(sum(shares) / len(shares)))  # type: ignore[arg-type]
        else:
            rows.append(-sum(torch.log(share) for share in shares) / len(shares))
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("margin", [2.0, 0.1])
def test_info_nce(n: int, m: int, several: bool, inside: bool, margin: float) -> None:
    torch.manual_seed(0)
    q = F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1).requires_grad_()
    k = F.normalize(torch.randn(m, 6, dtype=torch.float64), dim=1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    positive, excluded = masks(n, m, several)
    weight = torch.randn(n, dtype=torch.float64)
    ours = info_nce(q @ k.T, positive, excluded, margin=margin, scale=scale, inside=inside)
    right = reference(q @ k.T, positive, excluded, margin, scale, inside)  # type: ignore[arg-type]
    assert torch.allclose(ours, right, rtol=1e-10, atol=1e-12)
    for mine, exact in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, scale)) for x in (ours, right))):
        assert torch.isfinite(mine).all() and torch.allclose(mine, exact, rtol=1e-8, atol=1e-12)


def test_controls_of_info_nce() -> None:
    """What the masks leave out matters."""
    torch.manual_seed(1)
    scores = torch.randn(9, 11, dtype=torch.float64).clamp(-1, 1)
    positive, excluded = masks(9, 11, True)
    one = info_nce(scores, positive, excluded, scale=5.0)
    assert not torch.allclose(one, info_nce(scores, positive, torch.zeros_like(excluded), scale=5.0))
    assert not torch.allclose(one, info_nce(scores, positive, excluded, scale=5.0, margin=0.0))
    assert not torch.allclose(one, info_nce(scores, positive, excluded, scale=5.0, inside=True))
    uniform = info_nce(torch.zeros(4, 4), torch.eye(4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool))
    assert torch.allclose(uniform, torch.full((4,), math.log(4)))


def test_pair_margin() -> None:
    cosine = torch.tensor([1.0, 0.2, 0.9, 0.2, -1.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    found = pair_margin(cosine, target, 0.5)
    expected = [0.0, 0.5 * 0.8**2, 0.5 * 0.4**2, 0.0, 0.5 * 0.5 * 4]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), cosine)
    assert torch.allclose(gradient, torch.tensor([0, -0.8, 0.4, 0, -1.0], dtype=torch.float64))


def test_meanings() -> None:
    # records: 0 (anchor a, right b), 1 (c, b), 2 (d, e; wrong b), 3 (f, c): a-b-c-f are one, d-e another
    text = torch.tensor([ord(c) for c in "abcbdebfcz"])
    record = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 3]) * 1000
    merges = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    found = meanings(text, record, merges).tolist()
    assert len({found[i] for i in (0, 1, 2, 3, 6, 7, 8)}) == 1
    assert found[4] == found[5] and len({found[0], found[4], found[9]}) == 3
    chain = torch.arange(40).repeat_interleave(2)[1:-1]  # each record shares a text with the next
    assert len(set(meanings(chain, torch.arange(78) // 2, torch.ones(78, dtype=torch.bool)).tolist())) == 1
    assert meanings(text, record, torch.zeros_like(merges)).unique().numel() == 7


@pytest.mark.parametrize("how", ["mean", "last", "first"])
def test_pooling(how: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 17, 5, dtype=torch.float64, requires_grad=True)
    lengths = [(3, 1, 7, 6), (5, 2, 10)]
    numbers = [(0, 1, 2, 9), (1, 0, 9)]  # 9 is padding; a text may have any number, and a row fewer than the most
    seq_idx = torch.stack([
        torch.cat([torch.full((n,), k) for n, k in zip(*row)]) for row in zip(lengths, numbers)
    ]).int()  # fmt: skip
    pooled = pool_documents(hidden, seq_idx, 3, how)  # type: ignore[arg-type]
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for row in range(2):
        for k in range(3):
            own = hidden[row][seq_idx[row] == k]
            if len(own):
                expected[row, k] = {"mean": own.mean(0), "last": own[-1], "first": own[0]}[how]
    assert torch.allclose(pooled, expected)
    for mine, exact in zip(*(torch.autograd.grad((x * expected.detach()).sum(), hidden) for x in (pooled, expected))):
        assert torch.allclose(mine, exact)
    assert (pooled[1, 2] == 0).all()


def test_dropout_by_key() -> None:
    x, keys = torch.ones(3, 40, 50), torch.tensor([5, 6, 7])
    dropped = keyed_dropout(x, 0.25, keys)
    assert abs(float((dropped == 0).double().mean()) - 0.25) < 0.02
    assert torch.equal(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert torch.equal(keyed_dropout(x[1:2], 0.25, keys[1:2]), dropped[1:2])  # whatever rows are beside it
    assert not torch.equal(dropped[0], dropped[1])  # control


def _ranked(rank: int, world: int, file: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    x = (
        torch.arange(5.0, dtype=torch.float64)
        .repeat_interleave(3)
        .view(5, 3)[slice(0, 2) if rank == 0 else slice(2, 5)]
    )
    x = (x + 1).requires_grad_()
    everything = gather_rows(x)
    ((everything**2).sum() * (rank + 1) + (x**3).sum()).backward()
    torch.save((everything.detach(), x.grad), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def test_gathering_with_gradients(tmp_path: Path) -> None:
    """Two ranks of different numbers of rows, against one process that holds all of them."""
    arguments = (2, str(tmp_path / "store"), str(tmp_path / "out"))
    mp.start_processes(_ranked, arguments, nprocs=2, start_method="fork")  # type: ignore[attr-defined]
    whole = (torch.arange(5.0, dtype=torch.float64).repeat_interleave(3).view(5, 3) + 1).requires_grad_()
    ((whole**2).sum() * 3 + (whole**3).sum()).backward()  # what both compute, added up
    gradients = []
    for rank in range(2):
        everything, gradient = torch.load(tmp_path / f"out{rank}")
        assert torch.equal(everything, whole.detach())
        gradients.append(gradient)
    assert whole.grad is not None and torch.allclose(torch.cat(gradients), whole.grad)
    assert gather_rows(whole) is whole
