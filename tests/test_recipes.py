"""Every preset builds, counts what it says, and its tiny twin learns; wrong recipes say what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.config import MoaiConfig
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError

# the published or derived counts; where ours differs the reason stands beside it
COUNTS = {
    "moai-3b": 3_001_401_088,
    "moai-4.7b": 4_652_908_288,
    "moai-2b": 2_445_304_064,
    "moai-mamba-2b": 1_989_412_864 + 24 * (128 + 16 + 16),  # norms on dt, B and C, so that it can leave as Jamba
    "moai-mamba-8b": 8_281_133_056 + 40 * (256 + 16 + 16),
    "moai-mamba-16b": 16_374_830_080 + 48 * (320 + 16 + 16),
    "moai-mamba-pure-0.9b": 896_747_520,
    "moai-mamba-pure-4.7b": 4_736_782_336,
    "moai-mamba-pure-8.5b": 8_546_964_480,
    "blues-01": 423_846_912 + 45 * 768,  # 200,019 tokens padded to 200,064
    "khanh-692m": 692_196_408,
    "moai-hybrid-1.7b": 1_679_410_464,
    "moai-hybrid-moe-0.8b": 778_971_264,
    "moai-embed-0.1b": 100_094_208,
    "quickstart": 5_039_968,
}
TINY = [name for name in recipes.list_recipes() if name.endswith("-tiny")]


def test_every_preset_is_counted_and_has_a_twin() -> None:
    full = [name for name in recipes.list_recipes() if name not in TINY]
    assert sorted(full) == sorted(COUNTS)
    assert {f"{name}-tiny" for name in full if name != "quickstart"} == set(TINY)


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_it_builds_and_counts(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.description
    counted = recipe.model.parameters()
    with torch.device("meta"):
        model = MoaiForCausalLM(recipes.get_config(name))
    assert sum(p.numel() for p in model.parameters()) == counted["total"]
    assert name not in COUNTS or counted["total"] == COUNTS[name]


def test_parts_add_up() -> None:
    counts = recipes.load("blues-01").model.parameters()
    parts = ("embedding", "token_mixers", "channel_mixers", "norms", "head")
    assert sum(counts[part] for part in parts) == counts["total"]
    assert round((counts["active"] - counts["embedding"]) / 1e6, 1) == 100.4  # active non-embedding, as published
    assert recipes.load("moai-2b").model.parameters()["non_embedding"] == 2_092_024_064


@pytest.mark.parametrize("name", TINY)
def test_the_twin_learns(name: str) -> None:
    torch.manual_seed(0)
    config = recipes.get_config(name)
    model = MoaiForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ids = torch.randint(0, 64, (4, 32))  # a batch to remember
    losses = []
    for _ in range(12):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.cross_entropy))
    assert abs(losses[0] - torch.log(torch.tensor(float(config.vocab_size)))) < 0.5  # knows nothing: ln V
    assert losses[-1] < losses[0] - 1.0


def test_dump_and_load_give_the_same_recipe(tmp_path: Path) -> None:
    for name in recipes.list_recipes():
        prompts = [] if recipes.load(name).loss.type == "info_nce" else ["eval.prompts=[한국어, 'a: b']"]
        recipe = recipes.load(name, ["train.out=x y", *prompts])
        file = tmp_path / "recipe.yaml"
        file.write_text(recipes.dump(recipe), encoding="utf-8")
        assert recipes.load(file) == recipe


def test_overrides() -> None:
    recipe = recipes.load(
        "moai-3b", ["optim.lr=3e-4", "optim.betas=[0.9, 0.99]", "model.num_hidden_layers=2", "data.train=x"]
    )
    assert recipe.optim.lr == 3e-4 and recipe.optim.betas == (0.9, 0.99) and len(recipe.model.layer_types) == 2


def test_numbers_in_powers_of_ten(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: moai-3b-tiny\ntrain: {steps: 1e3, batch_tokens: 1.5E5}\n")
    run = recipes.load(file, ["optim.lr=1e-3", "checkpoint.every=2e2"])
    assert (run.train.steps, run.train.batch_tokens, run.optim.lr, run.checkpoint.every) == (1000, 150_000, 1e-3, 200)
    assert isinstance(run.train.steps, int)


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ([], (100, None, None)),
        (["train.epochs=3"], (None, None, 3)),
        (["train.tokens=1e6"], (None, 1e6, None)),
        (["train.steps=null", "train.epochs=3"], (None, None, 3)),
        (["train.steps=5"], (5, None, None)),
        (["train.steps=null"], (None, None, None)),
        (["train.steps=5", "train.epochs=3"], (5, None, 3)),  # training refuses this one
    ],
)
def test_a_length_on_the_command_line_replaces_the_one_of_the_preset(overrides: list[str], length: object) -> None:
    run = recipes.load("moai-3b-tiny", overrides).train
    assert (run.steps, run.tokens, run.epochs) == length


def test_what_is_known_without_torch_is_what_torch_has() -> None:
    """Tables that are written out so that a recipe is checked without importing torch."""
    import inspect

    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from moai_llm.architecture import ACTIVATIONS, ROPE_TYPES
    from moai_llm.losses import LOSSES

    assert {name: list(inspect.signature(make).parameters) for name, make in LOSSES.items()} == recipes.LOSS_PARAMS
    assert set(ROPE_TYPES) - {"default", "ntk"} <= set(ROPE_INIT_FUNCTIONS)
    for name in ACTIVATIONS:
        act = ACT2FN[name]
        assert not list(act.parameters()) and torch.isfinite(act(torch.ones(3))).all()


def test_a_model_section_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: moai-2b\ntrain: {steps: 3}\n")
    recipe = recipes.load(file, ["model.num_hidden_layers=1"])
    assert recipe.model.hidden_size == 3840 and recipe.model.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=1"], r"train.stepz: unknown key \(did you mean 'steps'\?\)"),
        (["model.hiden_size=1"], r"did you mean 'hidden_size'"),
        (["trian.steps=1"], r"did you mean 'train'"),
        (["train.lr=1"], r"did you mean 'optim.lr'"),
        (["train.learning_rate=1"], r"here it is optim.lr"),
        (["train.steps=many"], r"train.steps: .*got 'many'"),
        (["train.precision=fp7"], r"'auto', 'fp32', 'bf16', 'fp16' or 'fp8'"),
        (["steps"], r"write section.key=value"),
        (["train.steps.x=1", "train.steps.y=1"], r"train.steps"),
        (["model.head_dim=137"], r"head_dim must be even, got 137"),
        (["model.layer_types=[sliding_attention]"], r"set sliding_window"),
        (["model.layer_types=[mambo]"], r"'mambo' is not one of"),
        (["model.num_key_value_heads=3"], r"multiple of num_key_value_heads"),
        (["model.mlp_layer_types=[sparse]", "model.num_experts_per_tok=9"], r"between 1 and num_experts"),
        (["model.mlp_layer_types=[sparse]", "model.num_experts_per_tok=1"], r"never learns"),
        (["model.num_hidden_layers=0"], r"at least 1"),
        (["model.hidden_act=sillu"], r"hidden_act: 'sillu' is not one of .*did you mean 'silu'"),
        (["model.rope_parameters.rope_type=yarm"], r"'yarm' is not one of .*did you mean 'yarn'"),
        (["model.rope_parameters.rope_type=yarn"], r"rope_type 'yarn' needs factor"),
        (["model.rope_parameters.rope_type=llama3"], r"needs factor, low_freq_factor, high_freq_factor"),
        (["model.rope_parameters.fator=2"], r"'fator' is not one of"),
        (["log.every=0"], r"log.every: .*greater than or equal to 1, got 0"),
        (["checkpoint.every=0"], r"checkpoint.every"),
        (["eval.every=-1"], r"eval.every"),
        (["train.micro_batch_size=0"], r"train.micro_batch_size"),
        (["data.seq_len=0"], r"data.seq_len"),
        (["train.batch_tokens=100"], r"batch_tokens 100 is less than one row, data.seq_len"),
        (["train.batch_tokens=-5"], r"train.batch_tokens"),
        (["train.steps=0"], r"train.steps"),
        (["train.tokens=-1"], r"train.tokens"),
        (["train.steps=1.5"], r"train.steps: .*fractional part, got 1.5"),
        (["optim.lr=-1"], r"optim.lr: .*greater than or equal to 0"),
        (["optim.lr=nan"], r"optim.lr"),
        (["optim.betas=[0.9, 1]"], r"optim.betas.1: .*less than 1"),
        (["optim.weight_decay=-0.1"], r"optim.weight_decay"),
        (["schedule.warmup=-1"], r"schedule.warmup"),
        (["schedule.decay=-0.1"], r"schedule.decay"),
        (["schedule.min_ratio=2"], r"schedule.min_ratio"),
        (["train.max_grad_norm=0"], r"train.max_grad_norm: .*greater than 0"),
        (["optim.name=adam"], r"optim.name: .*'adamw_8bit'"),
        (["optim.name=lion", "optim.eps=1e-8"], r"optim.eps does nothing with optim.name=lion: leave it out"),
        (["optim.momentum=0.9"], r"optim.momentum does nothing with optim.name=adamw"),
        (["optim.groups=[{match: '('}]"], r"optim.groups\[0\].match '\(' is not a regular expression"),
        (["optim.groups=[{match: a, lr_scal: 1}]"], r"optim.groups.0.lr_scal: unknown key \(did you mean 'lr_scale'"),
        (["optim.groups=[{lr_scale: 1}]"], r"optim.groups.0.match"),
        (["schedule.name=plateau"], r"follows the evaluations: set eval.every"),
        (["schedule.lr_scheduler_type=x"], r"here it is schedule.name"),
        (["train.optim=adamw"], r"here it is optim.name"),
        (["clip.percentile=101"], r"clip.percentile"),
        (["clip.name=value"], r"'norm', 'percentile' or 'agc'"),
        (["loss.type=focall"], r"loss.type 'focall' is unknown; there are .*did you mean 'focal'"),
        (["loss.type=focal", "loss.params.gama=1"], r"loss.params.gama is unknown; .*did you mean 'gamma'"),
        (["train.init_from=x", "model.num_hidden_layers=2"], r"model.num_hidden_layers: the model comes from"),
    ],
)
def test_wrong_recipes_say_what_to_do(overrides: list[str], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        recipes.load("moai-3b", overrides)


def test_options_of_an_optimizer() -> None:
    """Its own defaults where nothing is said, and null where it has no such option."""
    found = {name: recipes.load("moai-3b", [f"optim.name={name}"]).optim for name in ("adamw", "lion", "muon", "sgd")}
    assert found["adamw"].betas == (0.9, 0.95) and found["adamw"].momentum is None
    assert found["lion"].betas == (0.9, 0.99) and found["lion"].eps is None
    assert found["muon"].momentum == 0.95 and found["sgd"].momentum == 0.9 and found["sgd"].betas is None
    rules = ["optim.name=lion", "optim.groups=[{match: embed, lr_scale: 0.5}]"]
    recipe = recipes.load("moai-3b", rules)
    assert recipe.optim.groups[0].lr_scale == 0.5 and recipe.optim.groups[0].weight_decay is None
    assert recipes.from_tree(recipes.to_tree(recipe)) == recipe


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(MoaiError, match="did you mean 'moai-3b'"):
        recipes.load("moai-3")
    with pytest.raises(MoaiError, match="No such file"):
        recipes.load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(MoaiError, match="not readable YAML"):
        recipes.load(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(MoaiError, match="expected sections"):
        recipes.load(broken)
    broken.write_text("model: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(MoaiError, match="not readable YAML"):
        recipes.load(broken)


def test_get_config(tmp_path: Path) -> None:
    assert recipes.get_mamba_config("2b").layer_types == ["linear_attention"] * 24
    config = recipes.get_config("moai-hybrid-1.7b-tiny")
    config.save_pretrained(tmp_path)
    assert recipes.get_config(tmp_path).to_dict() == recipes.get_config(tmp_path / "config.json").to_dict()
    old = tmp_path / "mamba_config_2b.json"
    old.write_text(json.dumps({
        "model_type": "mamba_moai", "vocab_size": 128000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "state_size": 16, "conv_kernel_size": 4, "expand_factor": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "use_fast_scan": True, "use_checkpoint": True,
        "quantization_bits": 4, "use_quantization": False,
    }))  # fmt: skip
    assert recipes.get_config(old).parameters() == recipes.get_config("moai-mamba-2b").parameters()
    (tmp_path / "other.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MoaiError, match="'llama' is not ours"):
        recipes.get_config(tmp_path / "other.json")
    with pytest.raises(MoaiError, match="no such file"):
        recipes.get_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected an object"),
        ('{"num_layers": 3, "vocab_size": 5}', r"unknown key 'num_layers' \(did you mean 'num_hidden_layers'\?\)"),
        ('{"hidden_sizes": 3}', r"did you mean 'hidden_size'"),
        ('{"hidden_size": "x"}', "hidden_size"),
        ('{"head_dim": 7}', "c.json: RoPE .* head_dim must be even, got 7"),
        ('{"hidden_act": "sillu"}', "did you mean 'silu'"),
    ],
)
def test_wrong_config_files_say_what_to_do(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(MoaiError, match=message):
        recipes.get_config(tmp_path / "c.json")


def test_what_transformers_writes_into_a_config_is_read(tmp_path: Path) -> None:
    theirs = {"architectures": ["MoaiForCausalLM"], "torch_dtype": "bfloat16", "dtype": "float32", "use_cache": False,
              "transformers_version": "5.0", "decoder_start_token_id": 1, "pad_token_id": 0}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "moai", "vocab_size": 77, **theirs}))
    assert recipes.get_config(tmp_path / "c.json").vocab_size == 77


def test_the_older_keys_of_mamba_mean_mamba() -> None:
    config = MoaiConfig(state_size=8, expand_factor=3, num_hidden_layers=2)
    assert config.layer_types == ["linear_attention"] * 2 and (config.ssm_state_size, config.ssm_expand) == (8, 3)
    mixed = MoaiConfig(state_size=8, num_hidden_layers=2, layer_types=["full_attention"])
    assert mixed.layer_types == ["full_attention"] * 2
    assert MoaiConfig(num_hidden_layers=2).layer_types == ["full_attention"] * 2


def test_the_published_3b_json_is_understood() -> None:
    published = {
        "vocab_size": 122100, "hidden_size": 3840, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_qk_norm": True,
    }  # fmt: skip
    config = MoaiConfig(**published, head_dim=128, intermediate_size=5120, tie_word_embeddings=True)
    assert config.parameters() == recipes.load("moai-3b").model.parameters()
    with pytest.raises(ValueError, match="head_dim must be even, got 137"):  # 3840 / 28 is not a head size
        MoaiConfig(**published)


def test_architecture_is_plain_data() -> None:
    model = recipes.load("moai-3b-tiny").model
    changed = replace(model, layer_types=["mamba"], num_hidden_layers=3, ssm_norm=None)
    changed.resolve()
    assert changed.layer_types == ["linear_attention"] * 3 and changed.ssm_norm


def test_other_names_of_precisions() -> None:
    for written, meant in (("amp_bf16", "bf16"), ("amp_fp16", "fp16"), ("tf32", "fp32"), ("bf16", "bf16")):
        recipe = recipes.load("moai-3b-tiny", [f"train.precision={written}"])
        assert recipe.train.precision == meant and recipe.train.tf32
    with pytest.raises(MoaiError, match="contradict each other"):
        recipes.load("moai-3b-tiny", ["train.precision=tf32", "train.tf32=false"])
