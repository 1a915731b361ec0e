"""The linear layer of all bricks: torch's, with a product of our own for the few rows of a decoding step."""

from __future__ import annotations

from torch import Tensor, nn

from moai_llm.ops.linear import linear


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
