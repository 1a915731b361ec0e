"""Sources to a token store: read, tokenise, write, count what was kept and what was not.

The sources are cut into slices, several processes make blocks of tokens of them, and one takes the blocks in their
order and writes them. So the store has the same bytes however many processes there are. Every few seconds it notes how
far it is; a run that was killed, at any moment, goes on from there when it is started again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from moai_llm import __version__
from moai_llm.data import blocks
from moai_llm.data.blocks import (
    Block,
    Encoder,
    Job,
    Part,
    PieceError,
    Tally,
    encode_items,
    few_collections,
    read_ahead,
)  # fmt: skip
from moai_llm.data.code import CodeOptions
from moai_llm.data.collect import Collector, Report
from moai_llm.data.partial import Partial
from moai_llm.data.shards import Kind, refuse_existing
from moai_llm.data.sources import Reading, Skipped, Source, expand
from moai_llm.data.sources import pieces as cutting
from moai_llm.data.sources.pieces import slices
from moai_llm.data.writer import SHARD_TOKENS, StoreWriter
from moai_llm.runtime import MoaiError, logger, processors
from moai_llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moai_llm.data.clean import Cleaner
    from moai_llm.data.embedding_records import EmbeddingOptions
    from moai_llm.data.sft import ChatOptions

__all__ = ["Part", "Report", "prepare", "prepare_chats", "prepare_texts", "split", "split_texts"]

SMALL = 16 << 20  # bytes of sources that are read before other processes would have started
SAVE_SECONDS = 5.0  # between two notes of how far it is
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Document = TypeVar("Document")
Progress = Callable[[int, int], None]  # documents and tokens so far


def prepare(
    sources: Iterable[str | Path | Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    kind: Kind = "text",
    reading: Reading | None = None,
    valid: str | Path | None = None,
    part: Part | None = None,
    valid_share: float = 0.02,
    code: CodeOptions | None = None,
    chat: ChatOptions | None = None,
    embedding: EmbeddingOptions | None = None,
    clean: Cleaner | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Tokenise sources into a store. Text documents end with the end-of-text token; conversations keep their mask.

    What was done when a run is stopped stays beside `out`, and the same call goes on from it. The stores and the report
    are then those of a run that was never stopped.

    Args:
        reading: how to read: the columns' names, whether what is broken is skipped, ...
        valid: a second store, for what is held out; its report is `held_out` of the one returned.
        part: only the documents that are held out (`valid`) or only the others (`train`), in one store.
        valid_share: of the documents, which are held out.
        chat: what to learn of conversations, and what to do with long ones.
        embedding: how texts that belong together are read.
        clean: texts go through it first; the report's `dropped` names the rules.
        code: what to do with source code. What is held out is never rearranged: it measures plain text.
        shard_tokens: the store's files are cut behind the document that reaches this.
        workers: processes that read and tokenise; None for one for each processor, and none for little text. 1 does it
            all in this process. What only this process can read (standard input, sources of your own that cannot be
            pickled) is read here, and so many threads tokenise it.
        overwrite: replace a store that is there, and what another call that was stopped has left.
        fresh: begin anew, whatever a call that was stopped has left.

    Raises:
        MoaiError: unreadable sources, no documents, a tokenizer that training cannot use, or conversations in which no
            assistant says anything.
    """
    reading, out, valid = reading or Reading(), Path(out), None if valid is None else Path(valid)
    _check(kind, code, clean, valid_share, valid, out, part, workers)
    code = code or CodeOptions()
    code.check(tokenizer)
    skipped = Skipped(reading.skip_bad)
    found = expand(sources, skipped=skipped)
    every = round(1 / valid_share) if valid is not None or part is not None else 0
    job = Job(tokenizer, kind, replace(reading, progress=None), code, chat, embedding, clean, every, part=part)
    if kind == "text" and every:
        found = [read_ahead(source) if source.once else source for source in found]
        job = replace(job, few=_fewer_texts(job, found))
    outs: dict[Part, Path] = {"valid" if part == "valid" else "train": out}
    if valid is not None:
        outs["valid"] = valid
    processes, threads = _processes(workers, job, found)
    with _terminable(), Partial(out, valid) as partial_:
        run = _Run(job, found, outs, partial_, shard_tokens, skipped, reading, progress)
        state = partial_.open(run.described(valid), found, anew=fresh, drop=overwrite)
        if state is None or state["stage"] != "finished":
            for each in outs.values():
                refuse_existing(each, overwrite)
        with _explained(run, partial_):
            run.begin(state)
            if state is None or state["stage"] != "finished":
                run.work(processes, threads)
                run.finish()
            partial_.publish()
        return run.report()


class _Run:
    """The work of one call."""

    def __init__(
        self, job: Job, sources: list[Source], outs: dict[Part, Path], partial_: Partial, shard_tokens: int,
        skipped: Skipped, reading: Reading, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.job, self.sources, self.outs, self.partial = job, sources, outs, partial_
        self._shard_tokens, self._skipped, self._reading, self._progress = shard_tokens, skipped, reading, progress
        self._can_go_on = not any(source.once for source in sources)
        self._saved = time.monotonic()
        self._stage = "reading"
        self._is_between = True  # blocks, so that what was counted and what was written agree
        self.collector: Collector | None = None

    def described(self, valid: Path | None) -> dict[str, Any]:
        """Everything that the bytes of the stores depend on, but the sources."""
        job, tokenizer = self.job, self.job.tokenizer
        template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest() if job.kind != "text" else None
        return {
            "version": __version__, "kind": job.kind, "tokenizer": tokenizer.fingerprint, "roles": tokenizer.roles,
            "chat_template": template, "map": dict(job.reading.mapping), "skip_bad": job.reading.skip_bad,
            "max_record": job.reading.max_record, "encoding": job.reading.encoding, "code": asdict(job.code),
            "chat": None if job.chat is None else asdict(job.chat),
            "embedding": None if job.embedding is None else asdict(job.embedding), "few": job.few,
            "one held out of": job.every,
            "clean": None if job.clean is None else asdict(job.clean.config), "part": job.part,
            "valid": None if valid is None else str(valid.absolute()), "shard_tokens": self._shard_tokens,
            "slices": [cutting.PIECE_BYTES, blocks.BATCH, blocks.BATCH_SIZE],
        }  # fmt: skip

    def begin(self, state: dict[str, Any] | None) -> None:
        """Open the stores, new or where they were left."""
        writers = {}
        for name, out in self.outs.items():
            mark = None if state is None else state["stores"][name]
            writers[name] = StoreWriter(
                out, self.job.tokenizer, self.job.kind, shard_tokens=self._shard_tokens, work=self.partial.work(out),
                mark=mark,
            )  # fmt: skip
        self.collector = Collector(self.job, writers, self._skipped, state)
        self._stage = "reading" if state is None else state["stage"]
        if state is not None:
            logger.info("going on from what a run that was stopped has done (--fresh begins anew)")
        self._tell(self.collector.bytes_read)

    def work(self, processes: int, threads: int) -> None:
        """Read and tokenise what is left."""
        collector = self.collector
        assert collector is not None
        try:
            with closing(self._in_processes(processes) if processes else self._here(threads)) as made:
                for block in made:
                    self._is_between = False
                    collector.add(block)
                    self._is_between = True
                    self._tell(block.bytes_read)
                    if self._can_go_on and time.monotonic() - self._saved >= SAVE_SECONDS:
                        self.save()
        except PieceError as error:
            raise collector.explain(error) from None

    def _here(self, threads: int) -> Generator[Block, None, None]:
        collector = self.collector
        assert collector is not None
        encoder, done = Encoder(self.job, threads), collector.done
        with few_collections():
            for pieces in islice(self._slices(), collector.slice, None):
                yield from encoder.blocks(pieces, number=collector.number - done, skip=done)
                done = 0

    def _in_processes(self, processes: int) -> Generator[Block, None, None]:
        from moai_llm.data.pool import Pool
        from moai_llm.data.worker import Task

        collector = self.collector
        assert collector is not None
        first, done = collector.slice, collector.done
        with Pool(self.job, processes) as pool:
            numbers: Iterable[int] = repeat(0)
            if self.job.needs_numbers:
                counts = pool.work(Task(pieces, only_count=True) for pieces in self._slices())
                numbers = list(accumulate(counts, initial=0))[first:]
            portions = zip(islice(self._slices(), first, None), numbers)
            yield from pool.work(Task(pieces, number, 0 if i else done) for i, (pieces, number) in enumerate(portions))

    def _slices(self) -> Iterator[Any]:
        return slices(self.sources, self.job.reading)

    def _tell(self, count: int) -> None:
        assert self.collector is not None
        if self._reading.progress is not None:
            self._reading.progress(count)
        if self._progress is not None:
            self._progress(self.collector.number, self.collector.tokens)

    def save(self, stage: Literal["reading", "finished"] = "reading") -> None:
        """Note how far it is."""
        assert self.collector is not None
        self.partial.save({"stage": stage, **self.collector.mark()})
        self._stage, self._saved = stage, time.monotonic()

    def finish(self) -> None:
        """Make the stores whole."""
        assert self.collector is not None
        self.collector.check()
        self._is_between = False
        origins = list(dict.fromkeys(source.origin for source in self.sources))
        for side in self.collector.sides.values():
            side.writer.finish(origins)
        self.save("finished")

    def stop(self) -> bool:
        """Note how far it is and close the files, if that is worth keeping. Says whether it is kept."""
        if self.collector is None:
            return False
        if self.partial.is_saved and self._is_between and self._stage == "reading":
            with suppress(OSError):  # of a full disk: the last note holds
                self.save()
        for side in self.collector.sides.values():
            side.writer.release()
        return self.partial.is_saved

    def report(self) -> Report:
        assert self.collector is not None
        reports = self.collector.reports()
        report = reports["valid" if self.job.part == "valid" else "train"]
        report.held_out = reports.get("valid") if len(reports) > 1 else None
        return report


@contextmanager
def _explained(run: _Run, partial_: Partial) -> Iterator[None]:
    """Errors on their way out: what is kept, and that a disk is full."""
    try:
        yield
    except BaseException as error:
        is_kept = run.stop()
        kept = f"What was done is kept in {partial_.folder}: the same command goes on from there"
        if isinstance(error, OSError) and error.errno in FULL:
            then = f"{kept} when there is room" if is_kept else "Nothing is left of what was done"
            raise MoaiError(f"{partial_.folder}: {error.strerror}. {then}") from error
        if isinstance(error, MoaiError) and is_kept:
            past = "" if run.job.reading.skip_bad else ", with --skip-bad past what is broken"
            raise MoaiError(f"{error}\n{kept}{past}") from error
        if is_kept:
            logger.info(kept)
        raise


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what was started is ended, what was done is noted."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check(
    kind: Kind, code: CodeOptions | None, clean: Cleaner | None, valid_share: float, valid: Path | None, out: Path,
    part: Part | None, workers: int | None,
) -> None:  # fmt: skip
    if code is not None and kind != "text":
        raise MoaiError("fill-in-the-middle and chunks are for documents of source code, not for conversations")
    if clean is not None and kind != "text":
        raise MoaiError("the rules of cleaning are for documents, not for conversations")
    if not 0 < valid_share <= 0.5:
        raise MoaiError(f"the share to hold out must lie between 0 and 0.5, got {valid_share}")
    if valid is not None and part is not None:
        raise MoaiError("`valid` names a second store for what is held out, and `part` asks for one of the two only")
    if valid is not None and valid.absolute() == out.absolute():
        raise MoaiError(f"{out} cannot hold both what is trained on and what is held out: name two places")
    if workers is not None and workers < 1:
        raise MoaiError(f"at least one process must do the work, got {workers} workers")


def _fewer_texts(job: Job, sources: Sequence[Source]) -> bool:
    """Whether there are too few texts to hold one of so many out."""
    encoder, lenient = Encoder(job), replace(job.reading, skip_bad=True)

    def texts() -> Iterator[Any]:
        for pieces in slices(sources, job.reading):
            # what is broken is told when its turn comes; in a piece, its line is not known here
            yield from encoder.items(pieces, Tally(job.reading if pieces[0].unit == "all" else lenient))

    return sum(1 for _ in islice(texts(), job.every)) < job.every


def _processes(workers: int | None, job: Job, sources: Sequence[Source]) -> tuple[int, int]:
    """(worker processes, none where this one does it all; threads in which this one tokenises)."""
    wanted = workers or processors()
    known = [source.size for source in sources]
    if workers is None and None not in known and sum(size or 0 for size in known) < SMALL:
        return 0, wanted
    at_work = len(list(islice(slices(sources, job.reading), wanted)))
    if at_work < 2 or any(source.here for source in sources) or not _can_travel(job, sources):
        return 0, wanted
    return at_work, 1


def _can_travel(job: Job, sources: Iterable[Source]) -> bool:
    """Whether other processes can be told what to do."""
    if os.name != "posix":
        return False
    try:
        pickle.dumps(job.reading), pickle.dumps(job.clean)
        pickle.dumps([source for source in sources if source.path is None])
    except Exception:  # pickle has no common one
        return False
    return True


# ---------------------------------------------------------------- streams of documents


def split(documents: Iterable[Document], part: Part, every: int) -> Iterator[Document]:
    """The first of every so many documents for evaluation (`valid`), the others for training."""
    yield from (document for i, document in enumerate(documents) if (i % every == 0) == (part == "valid"))


def split_texts(texts: Iterable[tuple[str, str]], part: Part, every: int) -> Iterator[tuple[str, str]]:
    """`split`, but where there are fewer texts than that, the end of each is held out."""
    texts = iter(texts)
    first = list(islice(texts, every))
    if len(first) == every:
        yield from split(chain(first, texts), part, every)
        return
    for text, place in first:
        border = len(text) - len(text) // every
        yield (text[border:] if part == "valid" else text[:border]), place


def prepare_texts(
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    out: str | Path,
    sources: list[str],
    *,
    skipped: Skipped | None = None,
    code: CodeOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A text store from (text, place) pairs; `skipped` is the account of whoever reads them."""
    job = Job(tokenizer, code=code or CodeOptions())
    job.code.check(tokenizer)
    return _prepare_stream(job, texts, out, sources, skipped, overwrite, progress)


def prepare_chats(
    conversations: Iterable[tuple[Any, str]],
    tokenizer: Tokenizer,
    out: str | Path,
    sources: list[str],
    *,
    kind: Literal["chat", "preference"] = "chat",
    options: ChatOptions | None = None,
    skipped: Skipped | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A chat store from (messages, place), by the tokenizer's chat template; messages may have `tools`. Or a store of
    preference from (pair, place), two documents each. `skipped` is the account of whoever reads them, and of what
    cannot be rendered.
    """
    job = Job(tokenizer, kind, chat=options)
    return _prepare_stream(job, conversations, out, sources, skipped, overwrite, progress)


def _prepare_stream(
    job: Job, items: Iterable[tuple[Any, str]], out: str | Path, sources: list[str], skipped: Skipped | None,
    overwrite: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    skipped = Skipped() if skipped is None else skipped
    with StoreWriter(out, job.tokenizer, job.kind, overwrite=overwrite) as writer:
        collector = Collector(job, {"train": writer}, skipped)
        for block in encode_items(job, items, skipped, threads=processors()):
            collector.add(block)
            if progress is not None:
                progress(collector.number, collector.tokens)
        collector.check()
        writer.close(sources)
        return collector.reports()["train"]
