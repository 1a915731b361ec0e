"""Training on pairs of answers: DPO and its relatives.

The loss of a step is the mean over all its pairs, counted before the first backward, so micro-batches do not change it.
A reference model, where the loss has one, is the model that the run starts from; see `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from moai_llm.data.loader import Batch
from moai_llm.data.pair_loader import PairLoader
from moai_llm.data.shards import Store
from moai_llm.losses import PreferenceLoss
from moai_llm.modeling.model import MoaiForCausalLM, MoaiModelOutput
from moai_llm.ops.log_probs import document_sums, linear_log_probs
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError
from moai_llm.training import lora, reference
from moai_llm.training.fitting import rows_of
from moai_llm.training.objective import Counts, MicroBatch, Reads, count_tokens, hidden_states, with_router
from moai_llm.training.precision import Precision
from moai_llm.training.reference import Origin, file_of, fingerprint_of


class Preference:
    """Pairs of answers, by a loss that compares them.

    Args:
        start: reads the model of train.init_from once more, for a resumed run whose reference is gone.
    """

    reads: Reads = "preference"

    def __init__(self, loss: PreferenceLoss, recipe: Recipe, start: Callable[[], MoaiForCausalLM]) -> None:
        self.loss, self.recipe, self.start = loss, recipe, start
        self.reference: Tensor | None = None  # (pairs, 2)
        self._of_model = ""

    def identity(self) -> dict[str, str]:
        if not self.loss.needs_reference:
            return {}
        return {"reference": self._starting_model(Store(self.recipe.data.stores()[0]))}

    def _starting_model(self, store: Store) -> str:
        """The fingerprint of train.init_from, and how its weights are kept; where it is gone by now, what was kept with
        its numbers.
        """
        directory = Path(self.recipe.train.init_from or "")
        if self._of_model:
            return self._of_model
        if (directory / "config.json").is_file():
            self._of_model = ":".join([fingerprint_of(directory), *self._format()])
            return self._of_model
        kept = reference.origin_of(file_of(Path(self.recipe.train.out), store.fingerprint)).get("model")
        if kept is None:
            raise MoaiError(
                f"the reference log-probabilities in {self.recipe.train.out} are gone or damaged, and so is "
                f"train.init_from {directory}, from which they could be computed again: put either back"
            )
        return kept

    def _format(self) -> list[str]:
        """What the weights are rounded to below the adapters, if they are: their numbers are other ones."""
        config = self.recipe.lora
        return [f"{config.quantize}{'' if config.double_quant else ' fp32 scales'}"] if config.quantize else []

    def prepare(
        self, model: MoaiForCausalLM, store: Store, precision: Precision, *, resumed: bool, quiet: bool
    ) -> None:
        """The reference of data.train, and of data.valid for whoever evaluates on it. With adapters it is this model
        without them, so that there is never a second one in memory.
        """
        if not self.loss.needs_reference:
            return
        of_model = self._starting_model(store)
        below = lora.without_adapters(model) if lora.has_adapters(model) else nullcontext()
        models: list[MoaiForCausalLM] = [] if resumed and not lora.has_adapters(model) else [model]

        def starting_model() -> MoaiForCausalLM:
            if not models:
                models.append(self.start().to(precision.device))  # type: ignore[arg-type]
            return models[0]

        with below:
            self.reference = self._reference(store, of_model, precision, starting_model, quiet).to(precision.device)
            valid = self.recipe.data.valid
            if valid and Store(valid).manifest.kind == "preference":
                self._reference(Store(valid), of_model, precision, starting_model, quiet)

    def read_reference(self, store: Store, precision: Precision) -> None:
        """What `prepare` left in the run's folder of this store, for an evaluation.

        Raises:
            MoaiError: it is not there.
        """
        if not self.loss.needs_reference or self.reference is not None:
            return
        pairs, file = len(store) // 2, file_of(Path(self.recipe.train.out), store.fingerprint)
        found = reference.read(file, self._origin(store, self._starting_model(store), precision), pairs)
        if found is None:
            raise MoaiError(f"{file} is gone: go on with --resume, which computes it again")
        self.reference = found.to(precision.device)

    def _origin(self, store: Store, of_model: str, precision: Precision) -> Origin:
        data = self.recipe.data
        return Origin(of_model, store.fingerprint, str(data.seq_len), data.overlong or "truncate", precision.name)

    def _reference(
        self,
        store: Store,
        of_model: str,
        precision: Precision,
        model: Callable[[], MoaiForCausalLM],
        quiet: bool,
    ) -> Tensor:
        data = self.recipe.data
        loader = PairLoader(store, data.seq_len, seed=None, overlong=data.overlong)
        origin = self._origin(store, of_model, precision)
        file = file_of(Path(self.recipe.train.out), store.fingerprint)
        known = reference.read(file, origin, len(loader.pairs))
        used = torch.from_numpy(loader.kept.sum(1) > 0)
        if known is not None and not known[used].isnan().any():
            return known
        return reference.compute(
            model(), loader, self._log_probs_of, precision, rows_of(self.recipe), known=known,
            save=lambda values: reference.write(file, origin, values), quiet=quiet,
        )  # fmt: skip

    def _log_probs_of(self, model: MoaiForCausalLM, batch: Batch) -> Tensor:
        output, targets = hidden_states(model, batch)
        return pair_log_probs(model, output, batch, targets)[0]

    def look_ahead(self, *_: object) -> None:
        pass

    def count(self, batches: Sequence[Batch]) -> Counts:
        return Counts(sum(int((batch["pairs"] >= 0).sum()) for batch in batches), count_tokens(batches))

    def forward(
        self,
        model: MoaiForCausalLM,
        batch: Batch,
        counts: Counts,
        *,
        router_load: Tensor | None = None,
        noise_key: Tensor | None = None,
    ) -> MicroBatch:
        output, targets = hidden_states(model, batch, noise_key)
        log_probs, lengths = pair_log_probs(model, output, batch, targets)
        there, known = batch["pairs"] >= 0, None
        if self.loss.needs_reference:
            assert self.reference is not None
            known = self.reference.to(there.device)[batch["pairs"].clamp_min(0)].flatten(0, 1)
        found = self.loss(log_probs.flatten(0, 1), lengths.flatten(0, 1), known)

        def mean(values: Tensor) -> Tensor:
            return torch.where(there.flatten(), values, 0).sum() / counts.targets

        numbers = {
            "loss": mean(found.preference),
            "reward_chosen": mean(found.chosen),
            "reward_rejected": mean(found.rejected),
            "reward_margin": mean(found.chosen - found.rejected),
            "reward_accuracy": mean((found.chosen > found.rejected).to(found.chosen.dtype)),
        }
        return with_router(mean(found.objective), numbers, model, output, counts, router_load)


def pair_log_probs(
    model: MoaiForCausalLM, output: MoaiModelOutput, batch: Batch, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, most, 2) log-probability of both answers of each pair in the rows, and how many tokens it is the sum of."""
    rows, most = batch["pairs"].shape
    assert output.last_hidden_state is not None
    log_probs = linear_log_probs(output.last_hidden_state.flatten(0, 1), model.lm_head.weight, targets.flatten())
    # documents 2k and 2k + 1 of a row are its k-th pair; padding comes last, and is nothing to sum
    first = torch.arange(rows, device=targets.device)[:, None] * 2 * most
    documents = (first + batch["seq_idx"].clamp_max(2 * most - 1)).flatten()
    sums = document_sums(log_probs, documents, rows * most * 2)
    lengths = document_sums((targets.flatten() != -100).to(log_probs.dtype), documents, rows * most * 2)
    return sums.view(rows, most, 2), lengths.view(rows, most, 2)
