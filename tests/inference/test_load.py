"""What `load_model` takes beside our own directories: exports of our models, and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moai_llm.cli import main
from moai_llm.inference import Engine, Sampling, Session, load_model
from moai_llm.inference.load import UNNAMED
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_model_of_transformers_becomes_ours(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**SIZES)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**SIZES))
    made.eval().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, prompt = load_model(tmp_path, "cpu", "fp32"), tokenizer.encode("Interest is paid")
    assert isinstance(model.model, MoaiForCausalLM) and not model.model.training
    engine = Engine(model)
    request = engine.submit(prompt, Sampling(8, temperature=0))
    while engine.busy:
        engine.step()
    theirs = made.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    assert request.tokens == theirs[0, len(prompt) :].tolist()[: len(request.tokens)] and request.tokens


def test_what_our_bricks_do_not_compute_stays_what_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, prompt = load_model(tmp_path, "cpu", "fp32"), tokenizer.encode("Interest is paid")
    assert type(model.model) is GPT2LMHeadModel
    session, greedy = Session(model), Sampling(6, temperature=0)
    first = list(session.stream(prompt, greedy))
    longer = [*prompt, *first, 5, 6]
    assert list(session.stream(longer, greedy)) == list(Session(model).stream(longer, greedy))


def foreign(kind: str, tokenizer: Tokenizer, place: Path) -> Path:
    """A model of transformers that our bricks do not compute."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt2":
        made: torch.nn.Module = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=512, n_positions=48, n_embd=8, n_layer=1, n_head=2, **ends)
        )
    else:
        made = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                vocab_size=512, hidden_size=16, num_hidden_layers=1, state_size=4, num_heads=4, head_dim=8, n_groups=1,
                chunk_size=8, **ends,
            )
        )  # fmt: skip
    made.save_pretrained(place)  # type: ignore[operator]
    tokenizer.save(place)
    return place


@pytest.mark.filterwarnings("ignore:.*fast path is not available")
@pytest.mark.parametrize(("kind", "context", "bounded"), [("gpt2", 48, True), ("mamba2", UNNAMED, False)])
def test_a_class_may_name_its_context_or_none(
    kind: str, context: int, bounded: bool, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = foreign(kind, tokenizer, tmp_path)
    model = load_model(place, "cpu", "fp32")
    assert (model.context, model.bounded) == (context, bounded)
    text = "Interest is paid on the deposit. " * 12
    tokens = len(tokenizer.encode(text))
    assert tokens > 60
    main(["eval", "perplexity", str(place), "--text", text, "--device", "cpu"])
    assert f" {tokens - -(-tokens // min(context, tokens))} " in capsys.readouterr().out  # predicted, over all windows
    arguments = ["generate", str(place), "--max-new-tokens", "4", "--kv-cache", "dynamic", "--device", "cpu"]
    main([*arguments, "--prompt", "Interest is paid"])
    assert capsys.readouterr().out.startswith("Interest is paid")
    session = Session(model)
    if bounded:
        with pytest.raises(MoaiError, match=f"the prompt has {tokens} tokens; this model takes {context}"):
            list(session.stream(tokenizer.encode(text), Sampling(3)))
    else:  # a state has no end
        ids = tokenizer.encode(text)
        assert len(list(session.stream((ids * 40)[: context + 5], Sampling(2, temperature=0)))) <= 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft still asks for it by the old name
def test_adapters_are_added_to_their_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    model = tiny_model(vocab_size=512).float()
    model.save_pretrained(base)
    tokenizer.save(base)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(adapters)
    settings = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    ids = torch.tensor([tokenizer.encode("Interest is paid")])
    with torch.no_grad():
        expected = wrapped(ids, use_cache=False).logits
        got = load_model(adapters, "cpu", "fp32").model(ids, use_cache=False).logits
        below = load_model(base, "cpu", "fp32").model(ids, use_cache=False).logits
    assert torch.allclose(got, expected, atol=1e-5) and not torch.allclose(got, below, atol=1e-2)
    (adapters / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "gone"}))
    with pytest.raises(MoaiError, match="adapters for the model gone, which is not there"):
        load_model(adapters)
