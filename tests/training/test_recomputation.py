"""Layers that are recomputed in the backward: the same gradients, less memory."""

from __future__ import annotations

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.ops import native
from moai_llm.runtime import MoaiError
from moai_llm.training.build import prepare_model
from moai_llm.training.loop import noise_keys
from moai_llm.training.measure import RealStep, random_batch
from tests.conftest import PAIRS, tiny_model

CPU = torch.device("cpu")
WAYS = ("none", "selective", "full")


@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_the_gradients_are_the_same(mixer: str, mlp: str) -> None:
    """To the bit, in packed rows and with routing noise; a key that differs is the control."""
    found = []
    for way, key in (*((way, 1) for way in WAYS), ("full", 2)):
        recipe = recipes.load("moai-3b-tiny", [f"train.activation_checkpointing={way}"])
        model = prepare_model(tiny_model(mixer, mlp, router_noise=mlp == "sparse").float(), recipe, CPU)
        for name, weight in model.named_parameters():
            if name.endswith("noise_weight"):
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [
            way != "none", way == "full"
        ]  # fmt: skip
        batch = random_batch(3, 17, 61, documents=2)
        model(**batch, use_cache=False, noise_key=noise_keys(0, key, range(3), CPU)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3]) == (mlp != "sparse")


@pytest.mark.parametrize("name", ["moai-3b-tiny", "moai-mamba-2b-tiny", "blues-01-tiny"])
def test_each_way_takes_less_memory_than_the_one_before(name: str) -> None:
    peaks = []
    for way in WAYS:
        recipe = recipes.load(name, [f"train.activation_checkpointing={way}", "train.precision=fp32"])
        step, batch = RealStep(recipe, CPU), [random_batch(8, 64, recipe.model.vocab_size)]
        step.run(batch)
        peaks.append(step.peak_bytes(batch))
    assert peaks[0] > 1.05 * peaks[1] and peaks[1] > 1.05 * peaks[2]


def test_how_it_may_be_written() -> None:
    for written, meant in (("true", "full"), ("false", "none"), ("selective", "selective"), ("none", "none")):
        recipe = recipes.load("moai-3b-tiny", [f"train.activation_checkpointing={written}"])
        assert recipe.train.activation_checkpointing == meant
        assert recipes.from_tree(recipes.to_tree(recipe)) == recipe
    with pytest.raises(MoaiError, match=r"train\.activation_checkpointing: input should be 'none', 'selective' or"):
        recipes.load("moai-3b-tiny", ["train.activation_checkpointing=some"])


def test_a_kernel_checks_itself_outside_of_what_is_recomputed() -> None:
    """Else the first use of the scan in a recomputed layer would begin the layer again from inside itself."""

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("kept for a recomputed layer")

    def check(random: native.Random) -> None:
        with torch.enable_grad():
            x = random(3).requires_grad_()
            torch.autograd.grad(x.square().sum(), x)

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        native.self_check(check)
        with pytest.raises(AssertionError):  # control
            check(lambda *shape: torch.ones(shape))
