"""What runs on CUDA is what runs on the CPU. Every test here needs a device (`make test-gpu`)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.data.prepare import prepare
from moai_llm.inference.generate import sample_text
from moai_llm.inference.load import load_model
from moai_llm.ops.dispatch import use
from moai_llm.ops.selective_scan import selective_scan
from moai_llm.planning.activations import Setting
from moai_llm.planning.layouts import Layout, memory
from moai_llm.tokenizer import Tokenizer
from moai_llm.training.loop import train
from moai_llm.training.measure import RealStep, random_batch
from tests.conftest import PAIRS, tiny_model
from tests.planning.test_activations import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def packed_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(9), torch.arange(13), torch.arange(11)]).expand(2, -1)
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_loss_and_gradients_are_those_of_the_cpu(mixer: str, mlp: str) -> None:
    model = tiny_model(mixer, mlp)
    on_cuda, rows = copy.deepcopy(model).to(CUDA), packed_rows()
    loss = model(**rows).loss
    theirs = on_cuda(**{key: t.to(CUDA) for key, t in rows.items()}).loss
    loss.backward()
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-9
    for (name, a), b in zip(model.named_parameters(), on_cuda.parameters()):
        assert a.grad is not None and b.grad is not None and (a.grad - b.grad.cpu()).abs().max() < 1e-9, name


@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_greedy_answers_with_a_cache_are_those_without(mixer: str, mlp: str) -> None:
    model = tiny_model(mixer, mlp).to(CUDA)
    prompt = torch.randint(0, 61, (1, 7), device=CUDA)
    cached, uncached = (
        model.generate(
            prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_is_the_reference(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(shape, generator=g).to(CUDA, dtype) for shape in ((2, 45, 19), (2, 45, 5), (2, 45, 5)))
    delta, A, D = (
        torch.rand(2, 45, 19, generator=g).to(CUDA),
        -torch.rand(19, 5, generator=g).to(CUDA),
        torch.ones(19).to(CUDA),
    )
    documents = (torch.arange(45, device=CUDA) // 20).expand(2, -1)
    results = []
    for name in ("torch", "reference"):
        inputs = [t.detach().requires_grad_() for t in (x, delta, A, B, C, D)]
        with use(selective_scan=name):
            y = selective_scan(*inputs, seq_idx=documents)
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), inputs)])
    for got, truth in zip(*results):
        assert (got - truth).float().norm() < (1e-5 if dtype is torch.float32 else 2e-2) * truth.float().norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["train.activation_checkpointing=selective"],
        ["train.compile=true"],
        ["train.offload=all"],
        ["train.micro_batch_size=auto", "train.dynamic_micro_batch=true"],
    ],
)
def test_a_run_learns_resumes_and_answers(
    precision: str, changes: list[str], tmp_path: Path, tokenizer: Tokenizer, text_file: Path
) -> None:
    prepare([text_file], tokenizer, tmp_path / "store")
    overrides = [
        f"data.train={tmp_path / 'store'}", f"train.out={tmp_path / 'run'}", f"train.precision={precision}",
        "train.device=cuda", "data.seq_len=32", "train.batch_tokens=512", "train.micro_batch_size=4", "optim.lr=3e-3",
        *changes,
    ]  # fmt: skip
    train(recipes.load("moai-hybrid-moe-0.8b-tiny", [*overrides, "train.steps=20"]), quiet=True)
    done = train(recipes.load("moai-hybrid-moe-0.8b-tiny", [*overrides, "train.steps=40"]), resume=True, quiet=True)
    assert done.checkpoint.name == "step-00000040"
    losses = [line.split(",") for line in (tmp_path / "run" / "training_log.csv").read_text().splitlines()]
    column = losses[0].index("loss")
    assert float(losses[-1][column]) < 0.7 * float(losses[1][column])
    assert sample_text(load_model(tmp_path / "run"), "Document", max_length=8, seed=0).startswith("Document")


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("name", SMALL)
def test_the_planned_memory_of_a_step(name: str, recompute: str) -> None:
    keys = [*SMALL[name], "data.seq_len=256", "train.precision=bf16", f"train.activation_checkpointing={recompute}"]
    recipe = recipes.load(name, keys)
    step = RealStep(recipe, CUDA)
    batches = [random_batch(4, 256, recipe.model.vocab_size, 3, seed) for seed in range(2)]
    step.run(batches)
    planned = memory(recipe, Layout("one device"), Setting(4, 256, True, "cuda", 3), 2).total
    assert planned == pytest.approx(step.peak_bytes(batches), rel=0.1)
