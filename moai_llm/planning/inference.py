"""Memory of a model that generates: its weights, and for each sequence the cache of keys and values or the states."""

from __future__ import annotations

from moai_llm.architecture import Architecture


def cache_bytes(a: Architecture, context: int, size: int = 2) -> float:
    """Bytes that one sequence of `context` tokens keeps: `size` bytes a number, the recurrence in fp32."""
    assert a.layer_types and a.head_dim and a.num_key_value_heads
    key_and_value = 2 * a.num_key_value_heads * a.head_dim * size
    inner = a.ssm_expand * a.hidden_size
    of = {
        "full_attention": key_and_value * context,
        "sliding_attention": key_and_value * min(context, a.sliding_window or context),
        "linear_attention": inner * (4 * a.ssm_state_size + size * a.conv_kernel_size),
    }
    return float(sum(of[kind] for kind in a.layer_types))
