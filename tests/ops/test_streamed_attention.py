"""Attention over blocks of keys is attention."""

from __future__ import annotations

import pytest
import torch

from moai_llm.ops.attention import attention_reference
from moai_llm.ops.streamed_attention import streamed_attention


@pytest.mark.parametrize("heads", (1, 2, 6))
@pytest.mark.parametrize("sizes", ([], [1], [7, 1, 12]))
@pytest.mark.parametrize("new", (1, 5))
def test_streamed_attention_is_attention(heads: int, sizes: list[int], new: int) -> None:
    torch.manual_seed(1)
    length = sum(sizes) + new
    q = 3 * torch.randn(2, 6, new, 7, dtype=torch.float64)
    k, v = (3 * torch.randn(2, heads, length, 7, dtype=torch.float64) for _ in range(2))
    *blocks, last = zip(k.split([*sizes, new], 2), v.split([*sizes, new], 2))
    y = streamed_attention(q, blocks[::-1], *last)
    torch.testing.assert_close(y, attention_reference(q, k, v, None, None, None, 7**-0.5))
    if sizes:
        assert not torch.allclose(y, streamed_attention(q, blocks[1:], *last))  # control: a block left out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_in_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (3, 40, 40))
    exact = attention_reference(q, k, v, None, None, None, 0.25)
    *past, last = zip(*(t.to(dtype).split([16, 21, 3], 2) for t in (k, v)))
    y = streamed_attention(q.to(dtype), past, *last)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
