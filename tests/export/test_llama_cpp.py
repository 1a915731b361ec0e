"""llama.cpp runs our GGUF files: the same text, the same probabilities, the same ids of strings.

The peer is the npm package node-llama-cpp, which brings llama.cpp built for the CPU and fetches nothing when installed:

    npm install --prefix .venv/llama-cpp --ignore-scripts node-llama-cpp@3.22.1

`MOAI_LLAMA_CPP` names another folder with its node_modules.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moai_llm.config import MoaiConfig
from moai_llm.data.embedded import library_texts, sample_texts
from moai_llm.export.gguf import export_gguf
from moai_llm.export.layout import refusals
from moai_llm.export.vocabulary import QWEN2_SPLIT
from moai_llm.inference.load import TextModel, load_model
from moai_llm.recipe import RECIPES, get_config
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT, O200K_SPLIT
from moai_llm.tokenizer.train import train_tokenizer
from tests.conftest import ROOT, tiny_config
from tests.export.conftest import IN_LLAMA_CPP, KINDS, save, split_by

pytestmark = pytest.mark.slow
TOKENS = 24
PROMPTS = [
    "안녕하세요 세계.", "이자는 은행이", "복리가 뭐예요?", "서울의 봄은 1979년",
    "The quick brown fox", "Interest is paid on", "In 1840, postage", "Once upon a time",
    "日本の首都は", "銀行の利子は", "今日は良い天気", "カタカナとABC",
    "今天天气很好", "银行存款的利息", "中国的首都是", "他说:“你好",
    "def add(a, b):\n    return", "for i in range(10):\n", "x = {'a': [1, 2.5]}", "#include <stdio.h>\nint main(",
]  # fmt: skip
PIECES = [
    "안녕하세요", "한국어 토큰화", "金融市場", "日本語のテキスト", "今天天气很好", "가나다\u1112\u1161\u11ab",
    "か\u3099", "Hello, World!", "  leading", "trailing  ", "\n\n\tdef f(x):\n", "3.14159", "1,234,567",
    "don't I'LL WE'VE", "x==y!=z", "http://a.b/c?d=e", "____", "\r\n", "\x01", "\u200b", " \u00a0 ", "\u3000全角",
    "ﬁ ½ ²", "café naïve", "e\u0301", "नमस्ते", "السلام", "приветМир", "❤️❤️", "🚀👩‍👩‍👧",
]  # fmt: skip


@pytest.fixture(scope="module")
def peer() -> Path:
    """The folder that holds node_modules/node-llama-cpp."""
    folder = Path(os.environ.get("MOAI_LLAMA_CPP", ROOT / ".venv" / "llama-cpp"))
    if shutil.which("node") is None or not (folder / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(
            "needs node and the package node-llama-cpp: npm install --prefix .venv/llama-cpp --ignore-scripts "
            "node-llama-cpp@3.22.1"
        )
    return folder


def ask(peer: Path, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What llama.cpp answers to each job, see llama_cpp.mjs."""
    job, answer = folder / "job.json", folder / "answer.json"
    job.write_text(json.dumps(jobs), encoding="utf-8")
    program = Path(__file__).with_name("llama_cpp.mjs")
    done = subprocess.run(["node", program, peer, job, answer], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answer.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """1,500 tokens of the sample in four languages and code."""
    return train_tokenizer([text for several in sample_texts().values() for text in several], 1500, fewer=True)


def strings() -> list[str]:
    """2,500 of them: sentences in four languages, code, documentation, and random mixtures of what is hard."""
    found = [line for several in sample_texts().values() for text in several for line in (text, *text.split(". "))]
    found += [text[i : i + 300] for text, _ in islice(library_texts(), 200) for i in range(0, 1500, 300) if text[i:]]
    draw = random.Random(0)
    found += ["".join(draw.choice(PIECES) + draw.choice(["", " ", "\n", "  "]) for _ in range(draw.randint(1, 6)))
              for _ in range(1500)]  # fmt: skip
    return found


@torch.no_grad()
def agreement(
    model: TextModel, prompts: list[list[int]], continued: list[list[dict[str, Any]]]
) -> tuple[int, float, float]:
    """How many prompts are continued alike to the end, and the largest difference of any probability on the way, and of
    any of their logarithms: models of random weights spread their probability thin.
    """
    alike, worst, logarithm = 0, 0.0, 0.0
    for prompt, steps in zip(prompts, continued, strict=True):
        ids = torch.tensor([prompt + [step["id"] for step in steps]])
        size = model.tokenizer.vocab_size
        logits = model.model(ids).logits[0, len(prompt) - 1 : -1, :size].float()
        theirs = torch.tensor([step["probabilities"] for step in steps])
        worst = max(worst, (logits.softmax(-1) - theirs).abs().max().item())
        logarithm = max(logarithm, (logits.log_softmax(-1) - theirs.log()).abs().max().item())
        alike += logits.argmax(-1).tolist() == ids[0, len(prompt) :].tolist() and len(steps) == TOKENS
    return alike, worst, logarithm


def exportable() -> dict[str, MoaiConfig]:
    """Every tiny preset that llama.cpp computes, and every kind of the other tests."""
    names = sorted(file.stem for file in RECIPES.glob("*.yaml") if file.stem.endswith("-tiny"))
    found = {name: get_config(name) for name in [*names, "quickstart"]}
    found |= {name: tiny_config(**KINDS[name][0]) for name in IN_LLAMA_CPP}
    return {name: config for name, config in found.items() if None in refusals(config).values()}


def test_llama_cpp_continues_every_model_as_we_do(peer: Path, tmp_path: Path, words: Tokenizer) -> None:
    models, jobs = {}, []
    prompts = [words.encode(prompt) for prompt in PROMPTS]
    for i, (name, config) in enumerate(exportable().items()):
        folder, file = save(config, words, tmp_path / str(i)), tmp_path / f"{i}.gguf"
        export_gguf(folder, file)
        models[name] = load_model(folder, "cpu", "fp32")
        jobs.append({"model": str(file), "prompts": prompts, "tokens": TOKENS, "strings": PROMPTS})
    found = {}
    for (name, model), answer in zip(models.items(), ask(peer, tmp_path, jobs), strict=True):
        assert answer["ids"] == prompts, name
        found[name] = agreement(model, prompts, answer["continued"])
        alike, worst, logarithm = found[name]
        print(f"{name}: {alike} of {len(prompts)}, probabilities differ by up to {worst:.1e}, logs by {logarithm:.1e}")
    assert len(found) >= 24
    assert {name: alike for name, (alike, _, _) in found.items()} == dict.fromkeys(found, len(prompts))
    assert max(worst for _, worst, _ in found.values()) < 1e-3
    assert max(logarithm for _, _, logarithm in found.values()) < 1e-3
    other = models["moai-3b-tiny"], models["moai-4.7b-tiny"]  # control: another model does not pass
    answer = ask(peer, tmp_path, [jobs[list(models).index("moai-3b-tiny")]])[0]
    assert agreement(other[1], prompts, answer["continued"])[0] == 0


def test_llama_cpp_reads_every_type(peer: Path, tmp_path: Path, words: Tokenizer) -> None:
    """It computes with what the file holds: close to ours with the same rounded weights, and not equal, since it also
    rounds what the weights are multiplied with.
    """
    folder = save(get_config("moai-hybrid-moe-0.8b-tiny"), words, tmp_path / "made")
    prompts = [words.encode(prompt) for prompt in PROMPTS]
    jobs = []
    for dtype in ("fp16", "bf16", "q8_0", "q4_0"):
        export_gguf(folder, tmp_path / f"{dtype}.gguf", dtype=dtype)
        jobs.append({"model": str(tmp_path / f"{dtype}.gguf"), "prompts": prompts, "tokens": TOKENS, "strings": []})
    model = load_model(folder, "cpu", "fp32")
    for job, answer in zip(jobs, ask(peer, tmp_path, jobs), strict=True):
        alike, worst, _ = agreement(model, prompts, answer["continued"])
        print(f"{Path(job['model']).stem}: {alike} of {len(prompts)}, probabilities differ by up to {worst:.1e}")
        assert worst < {"fp16": 0.02, "bf16": 0.1, "q8_0": 0.1, "q4_0": 0.5}[Path(job["model"]).stem]


@pytest.mark.parametrize(
    "pattern", [O200K_SPLIT, CL100K_SPLIT, QWEN2_SPLIT, GPT2_SPLIT], ids=["o200k", "cl100k", "qwen2", "gpt2"]
)
def test_llama_cpp_gives_strings_our_ids(peer: Path, tmp_path: Path, words: Tokenizer, pattern: str) -> None:
    tokenizer = words if pattern == O200K_SPLIT else split_by(pattern, words)
    folder = save(get_config("moai-2b-tiny"), tokenizer, tmp_path / "made")
    export_gguf(folder, tmp_path / "model.gguf")
    texts = strings()
    job = {"model": str(tmp_path / "model.gguf"), "prompts": [], "tokens": 0, "strings": texts}
    theirs = ask(peer, tmp_path, [job])[0]["ids"]
    differ = [text for text, ids in zip(texts, theirs, strict=True) if tokenizer.encode(text) != ids]
    print(f"{len(differ)} of {len(texts)} strings get other ids")
    assert len(texts) >= 1500 and not differ
