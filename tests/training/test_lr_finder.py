"""The test of learning rates: it sees where learning sets in and where it breaks, and leaves the run as it was."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.cli import main
from moai_llm.data.loader import Loader
from moai_llm.data.shards import Store
from moai_llm.training.build import build_model
from moai_llm.training.lr_finder import Found, find_lr, plot, sweep
from moai_llm.training.precision import make_precision
from tests.training.conftest import MakeRecipe, train

CPU = torch.device("cpu")


def bowl(lowest: float = 1e-2, noise: float = 0.0) -> Found:
    """A loss that falls to `lowest` and rises behind it."""
    generator = torch.Generator().manual_seed(0)
    rates = [10 ** (-5 + 5 * i / 99) for i in range(100)]
    shape = [8 - 3 * math.exp(-(math.log10(rate / lowest) ** 2)) for rate in rates]
    return Found(rates, [loss + noise * float(torch.randn((), generator=generator)) for loss in shape])


def test_the_suggestion_lies_below_the_lowest_loss() -> None:
    for lowest in (1e-3, 1e-2):
        for noise in (0.0, 0.05):
            found = bowl(lowest, noise)
            assert lowest / 2 < found.rates[found.lowest] < lowest * 2
            assert found.suggested is not None and lowest / 12 < found.suggested < lowest / 1.5
    drawn = plot(bowl())
    assert drawn.count("<- suggested") == drawn.count("<- lowest loss") == 1 and len(drawn.splitlines()) < 26


def test_control_noise_is_no_learning() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(100, generator=generator)).tolist()
    flat = Found([10 ** (-5 + i / 20) for i in range(100)], [8 + x for x in noise])
    assert flat.suggested is None and "suggested" not in plot(flat)


def test_it_ends_where_the_loss_has_broken() -> None:
    found = bowl()
    ends = [i for i in range(1, 101) if Found(found.rates[:i], found.losses[:i]).broken]
    assert found.rates[ends[0]] > 1e-2 and ends[0] < 100


def test_the_model_and_random_numbers_stay_as_they_are(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    store = Store(recipe.data.train or "")
    model = build_model(recipe, store.tokenizer(), CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    loader, precision = Loader(store, 32, 0), make_precision("fp32", CPU)
    found = sweep(model, recipe, loader, precision, 1e-4, 1e-1, steps=6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert found.rates == pytest.approx([1e-4 * 1000 ** (i / 5) for i in range(6)][: len(found.rates)])
    again = sweep(model, recipe, loader, precision, 1e-4, 1e-1, steps=6)
    assert again == found and len(set(found.losses)) == len(found.losses)


def test_a_loss_that_is_not_finite_ends_it(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.max_grad_norm=1e30")
    store = Store(recipe.data.train or "")
    model = build_model(recipe, store.tokenizer(), CPU)
    found = sweep(model, recipe, Loader(store, 32, 0), make_precision("fp32", CPU), 1e20, 1e38, steps=8)
    assert 0 < len(found.rates) < 8 and all(math.isfinite(loss) for loss in found.losses)


def test_the_suggestion_is_near_the_rates_that_work(make_recipe: MakeRecipe) -> None:
    found = find_lr(make_recipe())
    assert found.suggested is not None and 3e-4 < found.suggested < 3e-2
    assert min(found.smooth) < found.smooth[0] - 1


def test_the_command(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """It writes one file into the run's directory and leaves everything there alone; the run can begin there."""
    from moai_llm.training import lr_finder

    monkeypatch.setattr(lr_finder, "find_lr", lambda recipe, progress: (progress(10, 1e-3, 7.0), bowl())[1])
    recipe, file = make_recipe("train.steps=1"), tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(recipe))
    main(["train", str(file), "--find-lr"])
    said = capsys.readouterr().out
    assert "step 10/100  lr 1.0e-03  loss 7.000" in said and "suggested: optim.lr=2." in said
    out = Path(recipe.train.out)
    assert [path.name for path in out.iterdir()] == ["lr_finder.csv"]
    with (out / "lr_finder.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 100 and rows[0].keys() == {"step", "lr", "loss", "smoothed"}
    train(recipe, fresh=True, quiet=True)
    with pytest.raises(SystemExit, match="leave out --resume and --fresh"):
        main(["train", str(file), "--find-lr", "--resume"])
