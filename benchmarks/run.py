"""python -m benchmarks.run [NAME ...] [--quick]: print the tables and write benchmarks/results/NAME.md."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BENCHMARKS = {
    "scan": "selective scan against the loop, mambapy and transformers",
    "training_step": "a training step against transformers and litgpt",
    "trainer": "the whole loop of moai train against transformers' Trainer: tokens/s",
    "linear_cross_entropy": "losses from hidden states against all logits at once: memory and time",
    "memory": "memory of a training step: planned, held at once, resident",
    "packing": "attention over packed documents: split against mask",
    "data_read": "reading packed rows beside datasets and torch's DataLoader, and the knobs of the loader",
    "data_prepare": "text to tokens on disk beside datasets and datatrove: CPU-seconds, memory, growth",
    "data_packing": "documents into rows: how full, how even, how fast",
    "decode": "greedy decoding against transformers generate, many clients, guessing ahead",
    "serve": "a server with 16 clients at once against one after the other",
    "data_dedup": "near-duplicates: speed and recall beside datasketch and rensa",
    "optimizers": "bytes of state and time of a step of each optimizer",
    "tokenizer": "training, encoding, memory and extension of tokenizers",
    "learning": "held-out loss on tiny Shakespeare beside a transformers baseline",
    "eval_tasks": "benchmark tasks and perplexity: our adapter against lm-eval's own",
    "transfer": "bits per byte after a model got another tokenizer, for each way to make its new rows",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and sizes, to see that it runs; writes nothing"
    )
    arguments = parser.parse_args()
    from benchmarks.harness import save
    from moai_llm.runtime import keep_freed_memory

    keep_freed_memory()  # for every candidate alike: what is compared is the work, not the page faults
    for name in arguments.names or BENCHMARKS:
        print(f"== {name}: {BENCHMARKS[name]}", flush=True)
        tables = import_module(f"benchmarks.{name}").run(arguments.quick)
        if not arguments.quick:
            print(f"written to {save(name, tables, f'python -m benchmarks.run {name}')}")


if __name__ == "__main__":
    main()
