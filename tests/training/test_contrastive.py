"""Training on texts that belong together: the loss of a step by hand, laws of the step, memory, whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from moai_llm.commands.train import make_hooks
from moai_llm.data.embedding_loader import EmbeddingLoader
from moai_llm.data.embedding_records import read_one
from moai_llm.data.embedding_store import ANCHOR, RIGHT
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.evaluation.embedding import as_search, evaluate_texts
from moai_llm.evaluation.ranking import retrieval
from moai_llm.losses import create_loss_function
from moai_llm.modeling.embedding import MoaiForEmbedding
from moai_llm.recipe import OptimConfig, Recipe
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import contrastive
from moai_llm.training.clipping import Clip
from moai_llm.training.contrastive import Contrastive, RandomState
from moai_llm.training.events import read_metrics
from moai_llm.training.loop import noise_keys, train_step
from moai_llm.training.objective import Counts
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import make_precision
from tests.conftest import tiny_config
from tests.data.test_embedding_store import prepare_related
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at
from tests.training.test_step import CPU, split

PRECISION = make_precision("fp32", CPU)


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Store:
    return prepare_related(tmp_path_factory.mktemp("related"), tokenizer)


def vector_model(
    mixer: str = "full_attention", mlp: str = "dense", seed: int = 0, **embedding: object
) -> MoaiForEmbedding:
    torch.manual_seed(seed)
    config = tiny_config(mixer, mlp, vocab_size=512, embedding=embedding, router_z_loss_coef=0.01)
    return MoaiForEmbedding(config).double()


def objective(kind: str = "info_nce", **params: float) -> Contrastive:
    return Contrastive(create_loss_function({"type": kind, "params": params}))  # type: ignore[arg-type]


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step_gradient(model: MoaiForEmbedding, made: Contrastive, batch: dict[str, Tensor], size: int) -> Tensor:
    """Of one step in micro-batches of so many rows, as the loop takes it."""
    model.zero_grad()
    parts = split(batch, size)
    keys = noise_keys(3, 4, range(batch["input_ids"].shape[0]), CPU).split(size)
    counts = made.count(parts)
    made.look_ahead(model, list(zip(parts, keys)), PRECISION)
    for part, key in zip(parts, keys):
        made.forward(model, part, counts, noise_key=key).loss.backward()
    return gradient(model)


def by_hand(model: MoaiForEmbedding, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """InfoNCE in one direction, each text alone in its row, equal texts and all that follows left out by Python."""
    texts = []
    for row in range(batch["input_ids"].shape[0]):
        for k in range(batch["role"].shape[1]):
            if batch["role"][row, k]:
                ids = batch["input_ids"][row][batch["seq_idx"][row] == k]
                vector = model(ids[None]).embeddings[0]
                texts.append(
                    (int(batch["record"][row, k]), int(batch["role"][row, k]), int(batch["text"][row, k]), vector)
                )
    same: dict[int, set[int]] = {}
    for record, role, text, _ in texts:
        if role < 3:
            same.setdefault(record, set()).add(text)
    for _ in same:  # merge what shares a text
        for a in same:
            for b in same:
                if same[a] & same[b]:
                    same[a] |= same[b]
    losses = []
    for record, role, _, vector in texts:
        if role != 1:
            continue
        right = [v @ vector / temperature for r, kind, _, v in texts if r == record and kind == 2]
        wrong = [v @ vector / temperature for r, kind, t, v in texts
                 if kind > 1 and t not in same[record] and not (r == record and kind == 2)]  # fmt: skip
        total = torch.stack([*right, *wrong]).logsumexp(0)
        losses.append(torch.stack([total - s for s in right]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_the_loss_of_a_step(related: Store, mixer: str) -> None:
    model, batch = vector_model(mixer), EmbeddingLoader(related, 96).rows(0, 4)
    expected = by_hand(model, batch, 0.1)
    exact = torch.autograd.grad(expected, list(model.parameters()))
    made = objective(temperature=0.1, symmetric=False)
    counts = made.count([batch])
    assert counts.targets == int((batch["role"] == 1).sum())
    part = made.forward(model, batch, counts)
    assert torch.isclose(part.loss, expected, rtol=1e-9)
    for ours, right in zip(torch.autograd.grad(part.loss, list(model.parameters())), exact):
        assert torch.allclose(ours, right, rtol=1e-7, atol=1e-10)
    careless = objective(temperature=0.1, symmetric=False, mask_equal_texts=False)  # control
    assert abs(float((careless.forward(model, batch, counts).loss - expected).detach())) > 1e-3


def pairs_by_hand(batch: dict[str, Tensor], vectors: dict[tuple[int, int], Tensor], loss: str) -> Tensor:
    """Each answer against the anchor before it in its row, one at a time: (cos - score)^2, or the margin loss."""
    losses, anchor = [], None
    for row in range(batch["role"].shape[0]):
        for k in range(batch["role"].shape[1]):
            role, score = int(batch["role"][row, k]), float(batch["score"][row, k])
            if role == ANCHOR:
                anchor = vectors[row, k]
            elif role:
                assert anchor is not None
                cosine = (anchor * vectors[row, k]).sum() / (anchor.norm() * vectors[row, k].norm())
                target = score if score >= 0 else float(role == RIGHT)
                if loss == "cosine":
                    losses.append((cosine - target) ** 2)
                else:
                    far, near = (1 - cosine) ** 2, (0.5 - (1 - cosine)).clamp_min(0) ** 2
                    losses.append((target * far + (1 - target) * near) / 2)
    return torch.stack(losses).sum() / len(losses)


@pytest.mark.parametrize("groups", [[[1, 2]], [[1, 3]], [[1, 2, 3, 3, 1, 2], [1, 3, 2, 0, 0, 0], [1, 2, 1, 2, 1, 2]]])
@pytest.mark.parametrize("kind", ["cosine", "pairwise"])
def test_the_loss_of_pairs(groups: list[list[int]], kind: str) -> None:
    """In fp64, loss and gradient by vectors of any length; 0 is a place in a row without a text. Some are graded."""
    role = torch.tensor(groups)
    generator = torch.Generator().manual_seed(5)
    score = torch.rand(role.shape, generator=generator).where(torch.rand(role.shape, generator=generator) < 0.5, -1.0)
    score = score.where(role > 1, -1.0)
    there = role > 0
    record, text = (role == ANCHOR).flatten().cumsum(0).view(role.shape), torch.arange(role.numel()).view(role.shape)
    batch = {"role": role, "score": score, "record": record, "text": text}
    raw = torch.randn(*role.shape, 7, dtype=torch.float64, generator=generator).requires_grad_()
    made, texts = objective(kind), contrastive.Texts.of(batch)

    def ours(texts: contrastive.Texts) -> Tensor:
        own = F.normalize(raw[there], dim=1)
        return sum(term for term, _ in contrastive.terms(made.loss, own, texts, own, texts, None))  # type: ignore

    hand = pairs_by_hand(batch, {(r, k): raw[r, k] for r, k in there.nonzero().tolist()}, kind)
    assert torch.allclose(ours(texts), hand, rtol=1e-12)
    (found,), (right,) = (torch.autograd.grad(value, raw) for value in (ours(texts), hand))
    assert torch.allclose(found, right, rtol=1e-9, atol=1e-12)
    assert not found[~there].any()
    if len(groups) > 1:  # controls
        other, own = objective("pairwise" if kind == "cosine" else "cosine").loss, F.normalize(raw[there], dim=1)
        [(another, _)] = contrastive.terms(other, own, texts, own, texts, None)
        ungraded = ours(texts._replace(score=torch.full_like(texts.score, -1.0)))
        shifted = texts.role.where(texts.role != ANCHOR, RIGHT).scatter(0, torch.tensor([0]), ANCHOR)
        for wrong in (another, ungraded, ours(texts._replace(role=shifted))):
            assert abs(float(wrong.detach() - hand.detach())) > 1e-2
        assert right.abs().max() > 1e-3 and 0 < (texts.score >= 0).sum() < (texts.role > 1).sum()


@pytest.mark.parametrize(("mixer", "mlp"), [("full_attention", "dense"), ("linear_attention", "sparse")])
@pytest.mark.parametrize("kind", ["info_nce", "pairwise", "cosine"])
def test_micro_batches_are_the_big_batch(related: Store, mixer: str, mlp: str, kind: str) -> None:
    """Weights after two steps in fp64, with dropout, routing losses and a learned temperature."""
    batch, weights = EmbeddingLoader(related, 96).rows(0, 6), []
    made = objective("info_nce", learned_temperature=True) if kind == "info_nce" else objective(kind)
    temperature = 0.05 if kind == "info_nce" else None
    for size in (6, 1, 4):
        model = vector_model(mixer, mlp, dropout=0.2, projection=9, temperature=temperature).train()
        optimizer, load, seen = make_optimizer(model, OptimConfig(lr=1e-2)), None, []
        for step in range(2):
            result = train_step(
                model, optimizer, PRECISION, split(batch, size), made, lr=1e-2,  # type: ignore[arg-type]
                clip=Clip(model), router_load=load, noise_seed=(0, step),  # type: ignore[arg-type]
            )  # fmt: skip
            load = result.expert_load
            seen.append(result.numbers)
        assert ("aux_loss" in seen[0]) == (mlp == "sparse")
        weights.append((torch.cat([p.detach().flatten() for p in model.parameters()]), seen, load))
    for other, numbers, load in weights[1:]:
        assert (weights[0][0] - other).abs().max() < 1e-9
        for mine, theirs in zip(weights[0][1], numbers):
            assert mine.keys() == theirs.keys()
            if kind == "info_nce":
                assert all(math.isclose(mine[key], theirs[key], rel_tol=1e-5) for key in mine)
        assert load is None or torch.equal(load, weights[0][2])  # no selection is counted twice


def test_control_a_mean_of_micro_batches_is_another_loss(related: Store) -> None:
    model, made, batch = vector_model().train(), objective(), EmbeddingLoader(related, 96).rows(0, 6)
    right = step_gradient(model, made, batch, 2)
    model.zero_grad()
    for part in split(batch, 2):
        (made.forward(model, part, made.count([part])).loss / 3).backward()
    assert (gradient(model) - right).norm() > 0.1 * right.norm()


class NoisyEmbedding(nn.Embedding):
    """Noise that comes from torch's generator, as a layer of somebody else's would draw it."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.dropout(super().forward(ids), 0.3)


def test_random_numbers_are_drawn_again(related: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass against a graph that was kept from the first; the control draws new ones."""
    model, made, batch = vector_model().train(), objective(), EmbeddingLoader(related, 96).rows(0, 6)
    model.model.embed_tokens.__class__ = NoisyEmbedding
    parts, counts = split(batch, 2), made.count([batch])
    torch.manual_seed(7)
    vectors = torch.cat([contrastive._vectors(contrastive._output(model, part, None), part) for part in parts])
    texts = contrastive.Texts.of(batch)
    model.zero_grad()
    sum(term for term, _ in contrastive.terms(made.loss, vectors, texts, vectors, texts, None)).backward()  # type: ignore
    kept, after = gradient(model), torch.rand(1)
    torch.manual_seed(7)
    assert (step_gradient(model, made, batch, 2) - kept).abs().max() < 1e-12 * kept.abs().max()
    assert torch.equal(torch.rand(1), after)  # and the generator goes on as if there had been one pass
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    torch.manual_seed(7)
    assert (step_gradient(model, made, batch, 2) - kept).norm() > 0.05 * kept.norm()
    assert counts == Counts(int((batch["role"] == 1).sum()), int((batch["seq_idx"] < batch["role"].shape[1]).sum()))


def saved_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were kept for backward passes at once."""
    alive = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.numel() * tensor.element_size()
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.numel() * self.tensor.element_size()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return most


def test_memory_does_not_grow_with_the_batch(related: Store) -> None:
    model, made, loader = vector_model().train(), objective(), EmbeddingLoader(related, 96)
    flat = [saved_bytes(lambda rows=rows: step_gradient(model, made, loader.rows(0, rows), 2)) for rows in (4, 16)]
    grown = [saved_bytes(lambda rows=rows: step_gradient(model, made, loader.rows(0, rows), rows)) for rows in (4, 16)]
    assert flat[1] < 1.1 * flat[0] and grown[1] > 3.5 * grown[0] and flat[1] < grown[1] / 5


def _ranked(rank: int, world: int, file: str, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    loader = EmbeddingLoader(Store(store), 96, step_rows=5)
    made = objective(learned_temperature=True)
    for size in (5, 1):
        model = vector_model(projection=9, temperature=0.05).train()
        found = step_gradient(model, made, loader.step(0, rank, world), size)
        torch.distributed.all_reduce(found)
        torch.save(found, f"{out}{rank}-{size}")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(related: Store, tmp_path: Path) -> None:
    """The gradient of a step shared by two processes, three rows and two, added up; at once and by micro-batches."""
    arguments = (2, str(tmp_path / "store"), str(related.path), str(tmp_path / "out"))
    torch.multiprocessing.start_processes(_ranked, arguments, nprocs=2, start_method="fork")  # type: ignore[attr-defined]
    loader, made = EmbeddingLoader(related, 96, step_rows=5), objective(learned_temperature=True)
    right = step_gradient(vector_model(projection=9, temperature=0.05).train(), made, loader.step(0), 5)
    for rank in range(2):
        for size in (5, 1):
            found = torch.load(tmp_path / f"out{rank}-{size}")
            assert (found - right).abs().max() < 1e-10 * right.abs().max()
    alone = [
        step_gradient(vector_model(projection=9, temperature=0.05).train(), made, loader.step(0, rank, 2), 5)
        for rank in range(2)
    ]
    assert (sum(alone) - right).norm() > 0.1 * right.norm()  # control: each rank among its own texts


@pytest.fixture
def make(make_recipe: MakeRecipe, related: Store) -> Callable[..., Recipe]:
    """A short run on the texts."""

    def made(*overrides: str, **options: str) -> Recipe:
        return make_recipe(
            f"data.train={related.path}", "loss.type=info_nce", "data.seq_len=96", "train.batch_tokens=576",
            "train.micro_batch_size=2", "train.steps=4", "checkpoint.every=2", *overrides, **options,
        )  # fmt: skip

    return made


def test_a_run_learns_which_texts_belong_together(make: Callable[..., Recipe], related: Store) -> None:
    recipe = make(f"data.valid={related.path}", "train.steps=40", "optim.lr=1e-3", "eval.every=20", "eval.rows=null",
                  "loss.params.learned_temperature=true", "embedding.pooling=last", "embedding.projection=24",
                  name="moai-embed-0.1b-tiny")  # fmt: skip
    last = train(recipe, hooks=make_hooks(recipe), quiet=True)
    rows = read_metrics(Path(recipe.train.out) / "metrics.jsonl")
    steps, evaluations = ([row for row in rows if key in row] for key in ("accuracy", "eval_loss"))
    assert evaluations[1]["mrr"] > 1.5 * evaluations[0]["mrr"] and evaluations[1]["recall_at_10"] > 0.7
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert steps[0]["temperature"] == pytest.approx(0.05) and steps[-1]["temperature"] != steps[0]["temperature"]
    assert {"objective", "grad_norm", "pairs"} <= set(steps[-1])
    model = MoaiForEmbedding.from_pretrained(last)
    assert model.width == 24 and model.settings.pooling == "last" and not model.training


def test_evaluations_are_those_of_the_command(related: Store, tokenizer: Tokenizer) -> None:
    """The texts of a store in packed rows, against its records read again and one vector for each text."""
    model, batches = vector_model().eval(), list(EmbeddingLoader(related, 96, seed=None).epoch(3))
    found = evaluate_texts(objective(), model, batches, PRECISION)
    with related.path.with_suffix(".jsonl").open(encoding="utf-8") as file:
        records = [read_one(json.loads(line)) for line in file]
    search = as_search(records)

    def vectors(texts: list[str]) -> np.ndarray:
        ids = [torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]]) for text in texts]
        with torch.no_grad():
            return np.stack([model(each).embeddings[0].numpy() for each in ids])

    right = retrieval(vectors(search.queries), vectors(search.documents), search.relevant, (1, 10))
    assert right.queries == 40 and found["mrr"] == pytest.approx(right.mrr, rel=1e-6)
    assert (found["recall_at_1"], found["recall_at_10"]) == pytest.approx((right.recall[1], right.recall[10]), rel=1e-6)
    whole = EmbeddingLoader(related, 4096, seed=None).rows(0, 1)
    loss = objective().forward(model, whole, Counts(40, 1)).loss.item()
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("augment", ["none", "delete"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    make: Callable[..., Recipe], tmp_path: Path, tokenizer: Tokenizer, augment: str
) -> None:
    keys = ["embedding.dropout=0.1", "loss.params.learned_temperature=true", f"embedding.augment={augment}"]
    if augment == "delete":
        (tmp_path / "alone.jsonl").write_text("".join(f'{{"text": "deposit {i} earns interest"}}\n' for i in range(60)))
        prepare([tmp_path / "alone.jsonl"], tokenizer, tmp_path / "alone", kind="embedding")
        keys.append(f"data.train={tmp_path / 'alone'}")
    whole = train(make(*keys, out="whole"), quiet=True)
    broken = make(*keys, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(3)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    other = train(make(*keys, "train.seed=1", out="other"), quiet=True)
    assert not same(whole, other)  # control


def test_from_a_language_model_and_on(make: Callable[..., Recipe], make_recipe: MakeRecipe) -> None:
    start = train(make_recipe("train.steps=1", out="start"), quiet=True)
    first = train(make(f"train.init_from={start}", "optim.lr=0", "train.steps=1", out="first"), quiet=True)
    ours, theirs = load_file(first / "model.safetensors"), load_file(start / "model.safetensors")
    assert set(theirs) - set(ours) <= {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    second = train(
        make(f"train.init_from={first}", "embedding.pooling=last", "train.steps=1", out="second"), quiet=True
    )
    assert MoaiForEmbedding.from_pretrained(second).settings.pooling == "last"


def test_losses_and_stores_that_do_not_fit(
    make: Callable[..., Recipe], make_recipe: MakeRecipe, store: Path, related: Store
) -> None:
    alone = related.path.with_name("alone.jsonl")
    alone.write_text("".join(f'{{"query": "deposit {i}", "pos": "paid {i}"}}\n' for i in range(9)))
    prepare([alone], related.tokenizer(), alone.with_suffix(""), kind="embedding", overwrite=True)
    for recipe, message in (
        (make(f"data.train={alone.with_suffix('')}", "loss.type=pairwise"), "would make all vectors the same"),
        (make_recipe(f"data.train={related.path}"), "for vectors: train on it with loss.type=info_nce"),
        (make(f"data.train={store}"), "holds text, not texts that belong together"),
        (make("data.packing=concat"), "would cut texts that belong together apart"),
        (make("loss.params.temperature=0.001"), "temperature 0.001 is below 0.01"),
        (
            make(f"data.train=[{{store: {related.path}, weight: 1}}, {{store: {store}, weight: 1}}]"),
            "one store of texts",
        ),
    ):
        with pytest.raises(MoaiError, match=message):
            train(recipe, quiet=True)
        assert not Path(recipe.train.out).exists()
    for key, message in (
        ("eval.prompts=[a]", "eval.prompts are continued by a language model"),
        ("embedding.pooling=first", "set embedding.bidirectional=true"),
        ("embedding.augment=twins", "set embedding.dropout=0.1"),
        ("embedding.augment_share=0.3", "augment_share does nothing with embedding.augment=none"),
    ):
        with pytest.raises(MoaiError, match=message):
            make(key)
    with pytest.raises(MoaiError, match="embedding does nothing with loss.type=cross_entropy"):
        make_recipe("embedding.pooling=last")
    with pytest.raises(MoaiError, match="holds texts that belong together, and loss.type=cross_entropy"):
        make_hooks(make_recipe(f"data.valid={related.path}"))


def test_adapters_learn_vectors(make: Callable[..., Recipe], make_recipe: MakeRecipe) -> None:
    pytest.importorskip("peft")
    start = train(make_recipe("train.steps=1", "optim.lr=0", out="start"), quiet=True)
    keys = (f"train.init_from={start}", "lora.rank=4", "lora.dropout=0.2", "optim.lr=1e-2")
    whole = train(make(*keys, out="whole"), quiet=True)
    broken = make(*keys, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(3)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    assert (whole / "adapter").is_dir() and MoaiForEmbedding.from_pretrained(whole).width == 64
