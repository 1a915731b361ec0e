"""Which implementation of each op runs on this machine, and why the others do not. MOAI_OPS=op=name forces one."""

from __future__ import annotations

import argparse

from rich.table import Table

from moai_llm.runtime import make_console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, ...")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from moai_llm.ops import native
    from moai_llm.ops.choices import choices
    from moai_llm.runtime import pick_device

    device = pick_device(arguments.device)
    table = Table("op", "fp32", "bf16", "implementations", box=None, pad_edge=False)
    for choice in choices(device):
        states = [f"{k} (no: {choice.missing[k]})" if k in choice.missing else k for k in choice.implementations]
        table.add_row(choice.op, choice.fp32, choice.bf16, ", ".join(states))
    make_console().print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    make_console().print(table)
    for source, path in native.loaded().items():
        make_console().print(f"{source} is built for this CPU: {path}")
