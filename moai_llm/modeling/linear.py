"""The linear layer of all bricks: torch's, with a product of our own for the few rows of a decoding step."""

from __future__ import annotations

from torch import Tensor, nn

from moai_llm.ops.linear import is_plain, linear


def plain(*layers: nn.Module | None) -> bool:
    """Whether these layers are their weights. What wraps one (an adapter) or stands for its weight (quantized,
    distributed) computes more than an op that reads the weights would see.
    """
    return all(layer is None or (type(layer) is Linear and is_plain(layer.weight)) for layer in layers)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
