"""Checkpoints of other classes as models of ours: the same logits and ids, ready to train, and nothing of them run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moai_llm.cli import main
from moai_llm.export.gguf import export_gguf
from moai_llm.export.import_native import import_native
from moai_llm.export.native import export_native
from moai_llm.export.vocabulary import QWEN2_SPLIT
from moai_llm.inference.load import load_model
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from tests.export.conftest import LLAMA3, split_by
from tests.tokenizer.foreign import byte_fallback

SIZE = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CLASSES = {
    "Qwen3": {**HEADS, "head_dim": 8},
    "Qwen2": {**HEADS, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3Moe": {**HEADS, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "Llama": {**HEADS, "rope_parameters": LLAMA3, "attention_bias": True},
    "Mistral": {**HEADS, "sliding_window": 7},
    "Mixtral": {**HEADS, "num_local_experts": 4},
    "Mamba": {"state_size": 5},
    "Jamba": {**HEADS, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
}


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """A directory as transformers writes it, of a name of CLASSES."""

    def make(kind: str = "Qwen3", *, dtype: torch.dtype = torch.float32, rows: int = 0, **changes: object) -> Path:
        torch.manual_seed(0)
        fields = {**SIZE, **CLASSES[kind], "vocab_size": tokenizer.vocab_size + rows, **changes}
        config = getattr(transformers, f"{kind}Config")(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.to(dtype).save_pretrained(tmp_path / "theirs")
        theirs = split_by(QWEN2_SPLIT, tokenizer) if kind == "Qwen2" else tokenizer  # transformers insists on it
        theirs.save(tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_arrives_with_its_logits(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(kind, rows=5)
    done = import_native(folder, tmp_path / "ours")
    assert done.origin == f"{kind}ForCausalLM" and done.found.largest < 1e-5 and not done.notes
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_model(tmp_path / "ours", "cpu", "fp32")
    assert sum(parameter.numel() for parameter in ours.model.parameters()) == done.parameters
    ids = torch.randint(0, ours.tokenizer.vocab_size, (2, 60))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours.model(ids).logits - expected).abs().max() < 1e-5
        assert (ours.model(ids.flip(1)).logits - expected).abs().max() > 1e-2  # control
    assert ours.tokenizer.fingerprint == load_tokenizer(folder).fingerprint
    assert ours.tokenizer.chat_template == load_tokenizer(folder).chat_template
    assert ours.model.generation_config.eos_token_id == ours.tokenizer.stop_ids


@pytest.mark.filterwarnings("ignore")
def test_there_and_back_is_the_same_file(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("Mixtral")
    import_native(folder, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back")
    theirs, back = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    assert theirs.keys() == back.keys() and all(back[name].equal(theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore")
def test_a_model_keeps_its_precision(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import_native(checkpoint(dtype=torch.bfloat16), tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert weights["model.layers.1.mixer.q_proj.weight"].equal(theirs["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.filterwarnings("ignore")
def test_what_arrives_trains(
    checkpoint: Callable[..., Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The commands that `moai import` prints."""
    checkpoint("Llama")
    monkeypatch.chdir(tmp_path)
    main(["import", "theirs", "--out", "ours"])
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM, " in shown and "--tokenizer ours --out STORE" in shown
    main(["data", "prepare", str(text_file), "--tokenizer", "ours", "--out", "store"])
    main([
        "train", "moai-3b-tiny", "data.train=store", "train.init_from=ours", "train.out=run", "train.steps=6",
        "data.seq_len=32", "train.batch_tokens=128", "optim.lr=1e-2", "train.device=cpu", "train.precision=fp32",
    ])  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    main(["export", "run", "--format", "hf", "--out", "back"])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spare", ["<|finetune_right_pad_id|>", None])
def test_a_token_to_pad_with_is_found_or_made(
    spare: str | None, checkpoint: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = checkpoint()
    files = {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, text in files.items():
        (folder / name).write_text(text.replace("<|pad|>", spare or "<|other|>"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = import_native(folder, tmp_path / "ours")
    ours = load_model(tmp_path / "ours", "cpu", "fp32")
    assert ours.tokenizer.roles["pad_token"] == (spare or "<|pad|>") and spare or "<|pad|>" in done.notes[0]
    grown = 0 if spare else 1
    assert ours.model.config.vocab_size == ours.tokenizer.vocab_size == tokenizer.vocab_size + grown
    assert len(done.notes) == 1 + grown and ours.model.config.pad_token_id == ours.tokenizer.pad_id


class Opens:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.file,)


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_may_hold_tensors_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert import_native(folder, tmp_path / "ours").found.largest < 1e-5
    torch.save({**weights, "x": Opens(tmp_path / "was-run")}, folder / "pytorch_model.bin")
    with pytest.raises(MoaiError, match="cannot be loaded"):
        import_native(folder, tmp_path / "other")
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "other").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # control
    assert (tmp_path / "was-run").exists()


@pytest.mark.filterwarnings("ignore")
def test_code_of_a_checkpoint_is_never_run(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    import_native(folder, tmp_path / "ours")
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "evil"}))
    with pytest.raises(MoaiError, match="is a 'evil'; what can be brought here are .*llama.*qwen3"):
        import_native(folder, tmp_path / "other")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_brought_here_says_why(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = checkpoint("Llama", mlp_bias=True), tmp_path / "ours"
    with pytest.raises(MoaiError, match="LlamaConfig.mlp_bias"):
        import_native(folder, out)
    with pytest.raises(MoaiError, match="only read"):
        import_native(folder, folder / "inside")
    settings = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised"), ({"model_type": "moai"}, "ours already"),
        ({"model_type": "gpt2"}, "is a 'gpt2'"), ({"vocab_size": 77}, "cannot be loaded|has 512 tokens, the model 77"),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(MoaiError, match=message):
            import_native(folder, out)
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text(json.dumps({**settings, "mlp_bias": False}))
    with pytest.raises(MoaiError, match="no tokenizer.json there"):
        import_native(folder, out)
    for name in ("nowhere", "./no/where"):
        with pytest.raises(MoaiError, match="neither a directory nor a name on the Hub"):
            import_native(name, out)
    with pytest.raises(MoaiError, match="no-one/no-model is no directory here and cannot be fetched"):
        import_native("no-one/no-model", out)  # the suite is offline
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_the_hub_is_read_where_it_was_fetched_to(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch itself is the Hub's library; what is asked of it is ours: safetensors, pickles only where there are
    none, and never a program.
    """
    folder, asked = checkpoint(), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    import_native("some/model", tmp_path / "ours")
    (folder / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(MoaiError, match="cannot be loaded"):
        import_native("some/model", tmp_path / "other")
    assert [name for name, _ in asked] == ["some/model"] * 3
    patterns = {pattern for _, several in asked[:2] for pattern in several}
    assert "*.safetensors" in patterns and not [p for p in patterns if "bin" in p or p.endswith(".py") or p == "*"]
    assert any("bin" in pattern for pattern in asked[2][1])


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_of_another_kind_comes_along(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Llama 2's: pieces with byte fallback. Such a model leaves for transformers, and not for llama.cpp."""
    folder = checkpoint("Llama")
    backend = byte_fallback()
    backend.add_special_tokens(["</s>", "<pad>"])
    Tokenizer(backend, {"eos_token": "</s>", "pad_token": "<pad>"}, None).save(folder)
    (folder / "chat_template.jinja").unlink()
    import_native(folder, tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").encode("he 가") == load_tokenizer(folder).encode("he 가")
    export_native(tmp_path / "ours", tmp_path / "back")
    with pytest.raises(MoaiError, match="SentencePiece with byte fallback"):
        export_gguf(tmp_path / "ours", tmp_path / "out.gguf")
