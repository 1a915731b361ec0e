"""Which learning rates others have used: a range for a kind of run and a size of model. It imports no torch.

The ranges are straight lines on logarithmic axes, wide enough to hold all that PUBLISHED names; a test compares them.
They say what is usual, not what is best; for that there is `moai train --find-lr`.
"""

from __future__ import annotations

from typing import NamedTuple

OFF = 10.0  # times outside its range at which a learning rate is probably a slip of the pen
SMALLEST = 1e6  # parameters: below, nothing is published, and the lines would lead anywhere


class Published(NamedTuple):
    kind: str
    model: str
    parameters: float
    lr: float
    source: str


# of AdamW and Adam; the highest learning rate of the run
PUBLISHED = (
    Published("pretrain", "GPT-3 125M", 125e6, 6e-4, "arXiv 2005.14165, table 2.1"),
    Published("pretrain", "GPT-3 1.3B", 1.3e9, 2e-4, "arXiv 2005.14165, table 2.1"),
    Published("pretrain", "GPT-3 13B", 13e9, 1e-4, "arXiv 2005.14165, table 2.1"),
    Published("pretrain", "GPT-3 175B", 175e9, 0.6e-4, "arXiv 2005.14165, table 2.1"),
    Published("pretrain", "Mamba 1.3B, improved recipe", 1.3e9, 1e-3, "arXiv 2312.00752, appendix E.2.1"),
    Published("pretrain", "Llama 2 7B", 7e9, 3e-4, "arXiv 2307.09288, table 1"),
    Published("pretrain", "Llama 2 70B", 70e9, 1.5e-4, "arXiv 2307.09288, table 1"),
    Published("pretrain", "DeepSeek 7B", 7e9, 4.2e-4, "arXiv 2401.02954, table 2"),
    Published("pretrain", "DeepSeek 67B", 67e9, 3.2e-4, "arXiv 2401.02954, table 2"),
    Published("pretrain", "Llama 3 405B", 405e9, 8e-5, "arXiv 2407.21783, table 3"),
    Published("continued", "Llemma 7B", 7e9, 1e-4, "arXiv 2310.10631"),
    Published("continued", "Llemma 34B", 34e9, 5e-5, "arXiv 2310.10631"),
    Published("sft", "SmolLM2 360M", 360e6, 1e-3, "huggingface/alignment-handbook, recipes/smollm2/sft"),
    Published("sft", "SmolLM2 1.7B", 1.7e9, 3e-4, "huggingface/alignment-handbook, recipes/smollm2/sft"),
    Published("sft", "Llama 2 chat 7B", 7e9, 2e-5, "arXiv 2307.09288, section 3.1"),
    Published("sft", "Tulu 3 8B", 8e9, 5e-6, "allenai/open-instruct, docs/tulu3.md"),
    Published("sft", "Tulu 3 70B", 70e9, 2e-6, "allenai/open-instruct, docs/tulu3.md"),
    Published("preference", "Zephyr 7B", 7e9, 5e-7, "arXiv 2310.16944"),
    Published("preference", "Tulu 3 8B", 8e9, 5e-7, "allenai/open-instruct, docs/tulu3.md"),
    Published("preference", "Tulu 3 70B", 70e9, 2e-7, "allenai/open-instruct, docs/tulu3.md"),
    Published("lora", "QLoRA 7B", 7e9, 2e-4, "arXiv 2305.14314, table 9"),
    Published("lora", "QLoRA 65B", 65e9, 1e-4, "arXiv 2305.14314, table 9"),
)
# kind of run -> (lowest and highest of a model with 1.3B parameters, slope of the lines)
LINES: dict[str, tuple[float, float, float]] = {
    "pretrain": (1.9e-4, 1.4e-3, -0.32),
    "continued": (3e-5, 6e-4, -0.32),
    "sft": (1.4e-5, 4.8e-4, -0.6),
    "preference": (1e-6, 1.5e-5, -0.6),
    "lora": (1.5e-4, 1.4e-3, -0.32),
}
NAMES = {
    "pretrain": "pretraining",
    "continued": "continued pretraining",
    "sft": "fine-tuning on conversations",
    "preference": "learning from preferences",
    "lora": "LoRA",
}
# beside AdamW: Lion after arXiv 2302.06675, section 5. Muon and Adafactor are scaled to AdamW's size of update
OF_ADAMW = {"lion": (0.1, 1 / 3)}
WITHOUT = ("sgd",)  # its learning rate depends on the size of the gradient: nothing to compare with
SIZES = (5e6, 125e6, 350e6, 1.3e9, 3e9, 7e9, 13e9, 70e9)


def guide(kind: str, parameters: float, optimizer: str = "adamw") -> tuple[float, float] | None:
    """The usual lowest and highest peak learning rate; None where there is none.

    Args:
        kind: pretrain | continued | sft | preference | lora.
        parameters: what one token passes through; of a mixture of experts only the chosen ones.
    """
    if optimizer in WITHOUT:
        return None
    low, high = (_line(kind, end, parameters) for end in (0, 1))
    down, up = OF_ADAMW.get(optimizer, (1.0, 1.0))
    return low * down, min(high, _line("pretrain", 1, parameters)) * up


def _line(kind: str, end: int, parameters: float) -> float:
    return LINES[kind][end] * float((max(parameters, SMALLEST) / 1.3e9) ** LINES[kind][2])


def kind_of_run(stored: str, init_from: str | None, *, lora: bool = False) -> str:
    """From what the store holds and whether there is a model to go on from. Conversations are fine-tuned on even where
    the weights are new.
    """
    if lora and stored != "preference":
        return "lora"
    return {"chat": "sft", "preference": "preference"}.get(stored, "continued" if init_from else "pretrain")


def advice(lr: float, kind: str, parameters: int, optimizer: str = "adamw") -> str | None:
    """A warning for a learning rate far outside what is usual."""
    usual = guide(kind, parameters, optimizer)
    if usual is None or usual[0] / OFF <= lr <= usual[1] * OFF:
        return None
    low, high = usual
    way = f"{low / lr:.0f} times below" if 0 < lr < low else "below" if lr < low else f"{lr / high:.0f} times above"
    return (
        f"optim.lr {lr:.1e} is {way} what is usual for {NAMES[kind]} with {optimizer} at {shown(parameters)} active "
        f"parameters, {low:.1e} to {high:.1e}: `moai recipes --lr-guide` has the table, `moai train ... --find-lr` "
        "measures"
    )


def table() -> list[tuple[str, ...]]:
    """Rows of the guide for AdamW: a size, and the range of each kind of run. The first row is the header."""
    rows = [("active parameters", *(NAMES[kind] for kind in LINES))]
    for size in SIZES:
        ranges = [guide(kind, size) for kind in LINES]
        rows.append((shown(size), *(f"{low:.1e} to {high:.1e}" for low, high in filter(None, ranges))))
    return rows


def shown(parameters: float) -> str:
    """1.3e9 -> "1.3B"."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return f"{parameters:.0f}"
