"""Activations and states in the host's memory: the same gradients and steps. Here the device is the host, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.planning.hardware import parse_hardware
from moai_llm.planning.plan import Options, make_plan
from moai_llm.recipe import OptimConfig
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import optim
from moai_llm.training.checkpoint import Checkpoints
from moai_llm.training.measure import random_batch
from moai_llm.training.offload import HostActivations, HostAdamW
from moai_llm.training.state import restore
from tests.conftest import PAIRS, tiny_model
from tests.training.conftest import MakeRecipe, train


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_moved_activations_give_the_same_gradients(mixer: str, mlp: str, recompute: bool) -> None:
    """To the bit; and what the backward gets are the copies, so that no activation was held."""
    model, batch = tiny_model(mixer, mlp).train(), random_batch(2, 13, 61, documents=2)
    model(**batch, use_cache=False).loss.backward()
    right = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    if recompute:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with HostActivations(model, smallest=0).hooks():
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), right)


def test_what_is_moved() -> None:
    weight, small = torch.nn.Linear(8, 8, bias=False), torch.ones(3, requires_grad=True)
    moved = HostActivations(weight, smallest=4 * 8 * 5)
    x = torch.randn(5, 8, requires_grad=True)
    with moved.hooks():
        y, z = weight(x), small * small
    kept, of_weight = y.grad_fn.next_functions, y.grad_fn
    assert of_weight._saved_self.data_ptr() != x.data_ptr()  # a copy
    assert of_weight._saved_mat2.data_ptr() == weight.weight.data_ptr()  # the weight itself
    assert z.grad_fn._saved_self.data_ptr() == small.data_ptr() and kept


def test_the_step_on_the_host_is_adamw(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """To the bit on one device, over steps and over a checkpoint."""
    config, found = OptimConfig(lr=1e-2, weight_decay=0.1), []
    for on_host in (False, True):
        model = tiny_model("linear_attention", "sparse").float()
        optimizer = optim.make_optimizer(model, config, on_host=on_host)
        assert isinstance(optimizer, HostAdamW) == on_host
        for step in range(4):
            batch = random_batch(2, 9, 61, seed=step)
            model.train()(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                saved = Checkpoints(tmp_path / str(on_host)).save(2, model, tokenizer, "", optimizer, {})
                optimizer = optim.make_optimizer(model, config, on_host=on_host)
                restore(saved, model, optimizer)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])


def test_where_there_is_nothing_to_move_to(make_recipe: MakeRecipe) -> None:
    with pytest.raises(MoaiError, match="train.offload=all moves memory of a CUDA device to its host, and this run is"):
        train(make_recipe("train.offload=all"), quiet=True)
    with pytest.raises(MoaiError, match="set optim.name=adamw, or train.offload=activations"):
        recipes.load("moai-3b-tiny", ["train.offload=optimizer", "optim.name=lion"])


def test_the_plan_knows_where_the_states_are() -> None:
    one = parse_hardware("A100-80GB")
    plain, moved = (
        make_plan(recipes.load("moai-3b", [f"train.offload={offload}"]), one, Options(micro_batch=1))
        for offload in ("none", "all")
    )
    assert moved.fits[0].memory.optimizer == 0.0 < plain.fits[0].memory.optimizer
    assert any("not modelled" in note for note in moved.notes) and not any("not modelled" in n for n in plain.notes)
