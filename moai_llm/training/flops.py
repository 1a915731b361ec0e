"""Work per token and model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

A forward and a backward take 6 operations per parameter that a token passes through, and 12 per layer, head, width of a
head and key that it attends to. Recomputed activations are not counted: they are no progress. The peaks are the dense
ones of the makers' data sheets; a device that is not listed has no MFU, because a guessed peak says nothing.
"""

from __future__ import annotations

from moai_llm.architecture import Architecture

# part of the name as CUDA reports it -> teraFLOP/s of dense matrix products in bf16 or fp16; the first that fits counts
PEAKS = {
    "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0,
    "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
}  # fmt: skip


def flops_per_token(model: Architecture, length: int) -> float | None:
    """Operations of one training step per token, in rows of `length` tokens; None where a brick is not known here.

    What attention skips because of causality or of borders between documents is counted, as PaLM does.
    """
    try:
        counts = model.parameters()
    except ValueError:  # a brick from outside the package
        return None
    # looking a token up is no product; the head is one, also where it shares the embedding's weights
    matrices = counts["active"] - counts["embedding"] - counts["head"] + model.vocab_size * model.hidden_size
    keys = {"full_attention": length, "sliding_attention": min(length, model.sliding_window or length)}
    attended = sum(keys.get(kind, 0) for kind in model.layer_types or ())
    return 6.0 * matrices + 12.0 * model.num_attention_heads * (model.head_dim or 0) * attended


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second the maker promises for this precision; None where that is not known here."""
    if precision not in ("bf16", "fp16"):
        return None
    return next((peak * 1e12 for name, peak in PEAKS.items() if name in device_name), None)
