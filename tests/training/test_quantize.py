"""QLoRA: what is in 4 bits and what is not, close to the model it was, only adapters learn, resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moai_llm import recipe as recipes
from moai_llm.cli import main
from moai_llm.inference.load import load_model
from moai_llm.modeling.model import MoaiForCausalLM, new_cache
from moai_llm.ops.nf4_weight import NF4Weight, stored_bytes
from moai_llm.optimization import LoraConfig
from moai_llm.runtime import MoaiError
from moai_llm.training import lora, quantize
from moai_llm.training.build import prepare_model
from moai_llm.training.events import read_metrics
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at

pytest.importorskip("peft")
CPU = torch.device("cpu")
TWINS = ["moai-3b-tiny", "moai-mamba-2b-tiny", "moai-hybrid-moe-0.8b-tiny"]
QLORA = ("lora.rank=4", "lora.quantize=nf4", "optim.lr=1e-2")


@pytest.fixture
def base(make_recipe: MakeRecipe) -> Path:
    return train(make_recipe("train.steps=1", out="base"), quiet=True)


def fresh(name: str) -> MoaiForCausalLM:
    torch.manual_seed(0)
    return MoaiForCausalLM(recipes.get_config(name)).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def ids(rows: int = 2, length: int = 21) -> Tensor:
    return torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TWINS)
def test_what_is_in_4_bits_computes_nearly_the_same(name: str) -> None:
    """A block of normal weights is off by 8 to 9 hundredths, and the layers of a model add up."""
    model, plain = fresh(name), fresh(name)
    quantize.quantize(model, CPU, double=True)
    packed = {name for name, p in model.named_parameters() if isinstance(p, NF4Weight)}
    kept = ("embed", "lm_head", "norm", "router", "conv", "A_log", "dt_bias", ".D", "x_proj", "dt_proj")
    assert not [name for name in packed if any(part in name for part in kept)]
    rest = {name for name, _ in model.named_parameters()} - packed
    assert all(any(part in name for part in kept) for name in rest)
    off = (logits(model, ids()) - logits(plain, ids())).norm() / logits(plain, ids()).norm()
    assert 1e-3 < off < 0.3
    rough = {n: p.sign() * p.abs().mean() for n, p in plain.state_dict().items() if n in packed}
    plain.load_state_dict(rough, strict=False)  # control: one bit a weight
    exact = logits(fresh(name), ids())
    assert (logits(plain, ids()) - exact).norm() / exact.norm() > 1.8 * off
    weights = {name: p.unpacked() if isinstance(p, NF4Weight) else p for name, p in model.named_parameters()}
    same_function = fresh(name)
    same_function.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(model, ids()), logits(same_function, ids()), atol=1e-5, rtol=1e-5)


def test_the_table_counts_every_byte() -> None:
    model = fresh(TWINS[2])
    lora.add_adapters(model, LoraConfig(rank=2))
    before = quantize.parts(model)
    assert all(part.before == part.after for part in before)
    quantize.quantize(model, CPU, double=True)
    after = quantize.parts(model)
    frozen = [p for name, p in model.named_parameters() if ".lora_" not in name]
    assert sum(part.before for part in after) == 4 * sum(p.numel() for p in frozen)
    assert sum(part.after for part in after) == sum(stored_bytes(p) for p in frozen)
    sizes = {part.name: part for part in after}
    assert {"attention", "Mamba", "dense mixers", "experts and router", "embeddings and head"} <= sizes.keys()
    assert sizes["experts and router"].after < 0.15 * sizes["experts and router"].before
    assert sizes["embeddings and head"].after == sizes["embeddings and head"].before
    lines = quantize.describe(model)
    assert lines[0].startswith("NF4: ") and len(lines) == len(after) + 1


@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_reads_what_training_does(rows: int) -> None:
    model = fresh(TWINS[2])
    quantize.quantize(model, CPU, double=False)
    tokens, cache, found = ids(rows, 9), new_cache(model.config), []
    with torch.inference_mode():
        for begin, end in [(0, 4), *((i, i + 1) for i in range(4, 9))]:
            found.append(model(input_ids=tokens[:, begin:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), logits(model, tokens), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("keys", [("lora.experts=true",), ("lora.double_quant=false", "train.precision=bf16")])
def test_a_run_trains_adapters_on_4_bits(make_recipe: MakeRecipe, base: Path, keys: tuple[str, ...]) -> None:
    recipe = make_recipe(*QLORA, *keys, f"train.init_from={base}", "train.steps=8", out="tuned")
    last = train(recipe, quiet=True)
    losses = [row["loss"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3
    states = load_file(last / "training_state" / "optimizer.safetensors")
    assert states and all(".lora_" in name for name in states)
    model = MoaiForCausalLM.from_pretrained(base, dtype=torch.float32)
    prepare_model(model, recipe, CPU)
    lora.load_adapter(last / lora.FOLDER, model)
    saved = load_model(last, dtype="fp32")  # plain: what the weights in 4 bits stand for, and the adapters
    torch.testing.assert_close(logits(saved.model, ids()), logits(model.eval(), ids()), atol=1e-4, rtol=1e-4)
    exact = MoaiForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lora.add_adapters(exact, recipe.lora)
    lora.load_adapter(last / lora.FOLDER, exact)
    assert (logits(exact, ids()) - logits(model, ids())).abs().max() > 1e-3  # control: not on what they were made from


@pytest.mark.parametrize("name", TWINS)
def test_only_adapters_get_gradients(name: str, make_recipe: MakeRecipe) -> None:
    experts = "true" if "moe" in name else "false"
    recipe = make_recipe(*QLORA, f"lora.experts={experts}", "train.init_from=x")
    model = prepare_model(fresh(name), recipe, CPU)
    model(input_ids=ids(), labels=ids()).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_resumed_run_is_the_same_to_the_bit(make_recipe: MakeRecipe, base: Path, checkpointing: str) -> None:
    keys = [
        *QLORA,
        "train.steps=5",
        f"train.init_from={base}",
        "lora.experts=true",
        f"train.activation_checkpointing={checkpointing}",
    ]
    whole = train(make_recipe(*keys, out="whole"), quiet=True)
    broken = make_recipe(*keys, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(4)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    if checkpointing == "none":
        other = train(make_recipe(*keys, "lora.double_quant=false", "train.steps=2", out="other"), quiet=True)
        assert not same(whole, other)  # control
        with pytest.raises(MoaiError, match="these differ: lora.quantize"):
            train(make_recipe(*keys, "lora.quantize=null", out="broken"), resume=True, quiet=True)


def test_by_the_command(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    main(["train", "moai-hybrid-moe-0.8b-tiny", f"data.train={recipe.data.train}", f"train.init_from={base}",
          "lora.rank=2", "lora.quantize=nf4", "train.steps=2", "data.seq_len=32", "train.batch_tokens=64",
          "train.device=cpu", f"train.out={tmp_path / 'tuned'}"])  # fmt: skip
    said = capsys.readouterr().out
    assert "NF4: 1." in said and "experts and router" in said and "LoRA: " in said
    assert load_model(tmp_path / "tuned").model.config.model_type == "moai"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora.quantize=nf4"], "lora.rank=0 is off.*Weights in 4 bits cannot be trained, only adapters"),
        (["lora.rank=2", "lora.double_quant=false", "train.init_from=x"], "does nothing without lora.quantize"),
        (["lora.rank=2", "lora.quantize=nf4", "train.compile=true", "train.init_from=x"], "lora.quantize=nf4 unpacks"),
        (["lora.rank=2", "lora.quantize=int4", "train.init_from=x"], "lora.quantize: input should be 'nf4'"),
        (["lora.rank=2", "lora.quantize=nf4"], "set train.init_from"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        recipes.load(TWINS[0], keys)
