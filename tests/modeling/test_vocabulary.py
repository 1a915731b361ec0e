"""Another vocabulary: every row is what it is said to be, and a renumbering changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PhiConfig, PhiForCausalLM

from moai_llm.commands.tokenizer_transfer import INITS as NAMES
from moai_llm.modeling.vocabulary import CHUNK, INITS, Row, resize_vocabulary
from moai_llm.runtime import MoaiError
from tests.conftest import tiny_model

ROWS: list[Row] = [(3,), (), (0,), (5, 7), (60, 1, 2, 9), (7, 5), (3,)]
USED = range(50)
matrices = pytest.mark.parametrize("tied", [True, False])


def model_of(tied: bool, dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(tie_word_embeddings=tied).to(dtype)


def old_rows(model: Any) -> list[Tensor]:
    """The embedding, and the head where it is another matrix."""
    found = [model.model.embed_tokens.weight, model.lm_head.weight]
    return [weight.detach().clone() for weight in found[: 1 if found[1] is found[0] else 2]]


@matrices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_row(tied: bool, dtype: torch.dtype) -> None:
    for init, made in {"mean": lambda parts: parts.mean(0), "first": lambda p: p[0], "last": lambda p: p[-1]}.items():
        model = model_of(tied, dtype)
        before = old_rows(model)
        resize_vocabulary(model, ROWS, init=init, used=USED)
        after = old_rows(model)
        assert len(after) == len(before) == 2 - tied
        for old, new in zip(before, after):
            assert new.shape == (len(ROWS), 32) and new.dtype == dtype
            for row, got in zip(ROWS, new):
                wanted = made(old[list(row)].double()) if row else old[list(USED)].double().mean(0)
                tolerance = 1e-15 if dtype == torch.float64 else 0  # one rounding, to the dtype
                assert (got - wanted.to(dtype)).abs().max() <= tolerance, (init, row)


def test_control_a_mean_in_bf16_is_another() -> None:
    old = old_rows(model_of(True, torch.bfloat16))[0]
    rows = [(i, i + 1, i + 2) for i in range(50)]
    model = model_of(True, torch.bfloat16)
    resize_vocabulary(model, rows)
    rounded_often = torch.stack([(old[a] + old[b] + old[c]) / 3 for a, b, c in rows])
    exact = torch.stack([old[list(row)].double().mean(0) for row in rows]).bfloat16()
    assert not torch.equal(rounded_often, exact) and torch.equal(old_rows(model)[0], exact)


def test_more_rows_than_a_chunk() -> None:
    rows: list[Row] = [(i % 61,) if i % 3 else (i % 61, (i + 7) % 61) for i in range(2 * CHUNK + 17)]
    model = model_of(False)
    before = old_rows(model)
    resize_vocabulary(model, rows)
    for old, new in zip(before, old_rows(model)):
        wanted = torch.stack([old[list(row)].mean(0) for row in rows])
        assert (new - wanted).abs().max() <= 1e-15


def test_random_rows_look_like_the_old_ones() -> None:
    rows: list[Row] = [(4,), *[(1, 2)] * 4000]
    drawn = []
    for seed in (0, 0, 1):
        model = model_of(False)
        before = old_rows(model)
        resize_vocabulary(model, rows, init="random", used=USED, seed=seed)
        drawn.append(old_rows(model))
    assert all(map(torch.equal, drawn[0], drawn[1])) and not torch.equal(drawn[0][0], drawn[2][0])
    for old, new in zip(before, drawn[0]):
        kept, spread = old[list(USED)], old[list(USED)].std(0, unbiased=False)
        assert torch.equal(new[0], old[4])
        assert ((new[1:].mean(0) - kept.mean(0)) / spread).abs().max() < 0.08
        assert (new[1:].std(0) / spread - 1).abs().max() < 0.06
    assert not torch.equal(drawn[0][0][1:], drawn[0][1][1:])


def test_a_bias_and_another_family() -> None:
    """Phi has a bias on its head and pads by an index, which would have no gradient under its old number."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=61, pad_token_id=3, **sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    bias = model.lm_head.bias.detach().clone()
    resize_vocabulary(model, ROWS, used=USED)
    wanted = torch.stack([(bias[list(row)] if row else bias[:50]).double().mean() for row in ROWS])
    assert torch.equal(model.lm_head.bias.detach(), wanted.float()) and model.lm_head.out_features == len(ROWS)
    assert model.config.vocab_size == model.vocab_size == model.model.embed_tokens.num_embeddings == len(ROWS)
    ids = torch.tensor([[3, 0, 3, 4]])
    assert model(input_ids=ids).logits.shape == (1, 4, len(ROWS))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[3].abs().sum() > 0


@matrices
def test_tied_stays_tied_and_both_learn(tied: bool) -> None:
    model = model_of(tied).train()
    model.model.embed_tokens.weight.requires_grad_(not tied)
    resize_vocabulary(model, ROWS)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == model.vocab_size == len(ROWS) and model.config.tie_word_embeddings == tied
    assert model.model.embed_tokens.weight.requires_grad != tied and model.lm_head.weight.requires_grad != tied
    model.requires_grad_(True)
    ids = torch.tensor([[1, 4, 6, 0]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@matrices
@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_a_renumbering_renumbers_the_logits(tied: bool, mixer: str) -> None:
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    new_id = order.argsort()
    old, new = (tiny_model(mixer, tie_word_embeddings=tied) for _ in range(2))
    resize_vocabulary(new, [(int(i),) for i in order])
    ids = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        before, after = old(input_ids=ids), new(input_ids=new_id[ids])
        assert (after.logits - before.logits[..., order]).abs().max() <= 1e-12
        assert (new(input_ids=ids).logits - before.logits[..., order]).abs().max() > 1e-3  # control: ids not renumbered
        losses = [float(m(input_ids=i, labels=i).loss) for m, i in ((old, ids), (new, new_id[ids]))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


@matrices
def test_more_tokens_leave_the_logits_of_the_old_ones(tied: bool) -> None:
    old, new = (tiny_model(tie_word_embeddings=tied) for _ in range(2))
    resize_vocabulary(new, [*((i,) for i in range(61)), (4, 5), (), (6, 7, 8)])
    ids = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        before, after = old(input_ids=ids).logits, new(input_ids=ids).logits
    assert after.shape[-1] == 64 and (after[..., :61] - before).abs().max() <= 1e-12
    middle = before[..., [4, 5]].mean(-1)  # the logit of a mean is the mean of the logits
    assert (after[..., 61] - middle).abs().max() <= 1e-12


def test_mistakes() -> None:
    model = model_of(True)
    with pytest.raises(MoaiError, match=r"init 'maen' is unknown; there are mean, .* \(did you mean 'mean'\?\)"):
        resize_vocabulary(model, ROWS, init="maen")
    with pytest.raises(MoaiError, match="has 61 rows in its embedding, so there is no row 61"):
        resize_vocabulary(model, [(0,), (1, 61)])
    assert model.config.vocab_size == 61
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 61))
    with pytest.raises(MoaiError, match="only plain matrices"):
        resize_vocabulary(model, ROWS)
    model.lm_head = torch.nn.Linear(32, 60, bias=False).double()
    with pytest.raises(MoaiError, match="60 rows in its head and 61 in its embedding"):
        resize_vocabulary(model, ROWS)


def test_the_command_names_the_same_inits() -> None:
    assert tuple(INITS) == NAMES


class Memory(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self.held[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        self.held = {cdata: (ref, size) for cdata, (ref, size) in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


@matrices
def test_memory_for_the_new_rows_and_a_chunk(tied: bool) -> None:
    """Beside what the model has: one matrix at a time, as the old embedding is given back before the head is made."""
    rows: list[Row] = [(i,) if i % 2 else (i, i + 1, i + 2) for i in range(20_000)]
    model = tiny_model(vocab_size=20_003, tie_word_embeddings=tied).float()
    matrix, matrices_of_model = 20_003 * 32 * 4, 1 if tied else 2
    with Memory() as memory:  # the old matrices count as well, once they are read
        resize_vocabulary(model, rows)
    assert memory.most < (matrices_of_model + 1.5) * matrix
    with Memory() as memory:  # control: a copy in fp64 beside the matrix would be seen
        model.lm_head.weight.detach().double()
    assert memory.most > 2.9 * matrix
