"""Laws of the optimizer step: accumulated micro-batches are the big batch; the gradient is the mean over targets."""

from __future__ import annotations

import pytest
import torch

from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import OptimConfig
from moai_llm.runtime import MoaiError
from moai_llm.training.clipping import Clip
from moai_llm.training.loop import noise_keys, train_step
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import make_precision
from tests.conftest import PAIRS, tiny_model

CPU = torch.device("cpu")


def batch(rows: int = 6, length: int = 15):  # type: ignore[no-untyped-def]
    """Rows with very different numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (rows, length), generator=generator)
    labels = ids.clone()
    for i in range(rows):
        labels[i, : 2 * i] = -100
    return {"input_ids": ids, "labels": labels}


def split(whole, size: int):  # type: ignore[no-untyped-def]
    return [{key: t[i : i + size] for key, t in whole.items()} for i in range(0, whole["input_ids"].shape[0], size)]


def steps(model: MoaiForCausalLM, size: int, count: int = 3):  # type: ignore[no-untyped-def]
    optimizer, clip = make_optimizer(model, OptimConfig(lr=1e-2)), Clip(model)
    precision, load, results = make_precision("fp32", CPU), None, []
    for _ in range(count):
        result = train_step(
            model.train(), optimizer, precision, split(batch(), size), lr=1e-2, clip=clip, router_load=load
        )
        load = result.expert_load
        results.append(result)
    return results


@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_accumulated_equals_the_big_batch(mixer: str, mlp: str) -> None:
    """In fp64, over three steps, with the balance loss on; the control is the mean of micro-batch means."""
    weights, norms = [], []
    for size in (6, 2, 4):
        model = tiny_model(mixer, mlp, router_z_loss_coef=0.01, router_noise=mlp == "sparse")
        norms.append([r.grad_norm for r in steps(model, size)])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in (1, 2):
        assert max(abs(a - b) for a, b in zip(norms[0], norms[other])) < 1e-10
        assert (weights[0] - weights[other]).abs().max() < 1e-10
    model = tiny_model(mixer, mlp)
    for part in split(batch(), 2):
        (model.train()(**part).loss / 3).backward()
    means = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    model(**batch()).loss.backward()
    right = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (means - right).norm() > 1e-2 * right.norm()


def test_the_numbers_of_a_step() -> None:
    model = tiny_model("full_attention", "sparse")
    whole = batch()
    targets = int((whole["labels"][:, 1:] != -100).sum())
    logits = model(whole["input_ids"]).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole["labels"][:, 1:].flatten())
    (result,) = steps(model, 3, count=1)
    assert result.targets == targets
    assert abs(result.numbers["loss"] - float(plain.detach())) < 1e-5
    assert abs(result.numbers["aux_loss"] - 2 * 0.01) < 1e-6  # two layers, uniform load: exactly the coefficient each
    assert torch.allclose(result.expert_load.sum(-1), torch.ones(2, dtype=result.expert_load.dtype))


def test_gradients_are_clipped() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    result = train_step(
        model.train(), optimizer, make_precision("fp32", CPU), [batch()], lr=1.0, clip=Clip(model, max_norm=0.01)
    )
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert result.grad_norm > 0.1 and abs(result.clip * result.grad_norm - 0.01) < 1e-6
    assert abs(float((after - before).norm()) - 0.01) < 1e-6


def test_a_batch_without_targets() -> None:
    nothing = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": torch.full((2, 5), -100)}
    model = tiny_model()
    with pytest.raises(MoaiError, match="without a single token to learn"):
        train_step(
            model, make_optimizer(model, OptimConfig()), make_precision("fp32", CPU), [nothing], lr=1, clip=Clip(model)
        )


def test_bf16_is_close_to_fp32() -> None:
    losses = []
    for name in ("fp32", "bf16"):
        model = tiny_model("linear_attention", "sparse").float()
        optimizer, precision = make_optimizer(model, OptimConfig()), make_precision(name, CPU)
        losses.append(
            train_step(model.train(), optimizer, precision, [batch()], lr=1e-3, clip=Clip(model)).numbers["loss"]
        )
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.05


def test_noise_keys_differ() -> None:
    keys = {key for seed in range(5) for step in range(50) for key in noise_keys(seed, step, range(8), CPU).tolist()}
    assert len(keys) == 5 * 50 * 8
