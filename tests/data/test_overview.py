"""The overview of a store says what the loader does, the page shows the same numbers, and the pieces that are shown are
those of the rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from moai_llm.data.loader import Loader
from moai_llm.data.merge import MergeSpec, merge
from moai_llm.data.overview import describe, look
from moai_llm.data.overview_page import page
from moai_llm.data.pieces import row_pieces, whole_document
from moai_llm.data.shards import Store
from moai_llm.recipe import PackingName
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.browser import MEASURE, Page, measured, outside
from tests.data.stores import some_documents, write_store

NAMES = ("text", "chat", "mix", "pairs")
SEQ_LEN = 32


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("stores") / "<b>&x"
    folder.mkdir()
    text = write_store(folder / "text", tokenizer, some_documents(tokenizer, 60, 0))
    chat = write_store(folder / "chat", tokenizer, some_documents(tokenizer, 40, 1), "chat")
    pairs = write_store(folder / "pairs", tokenizer, some_documents(tokenizer, 8, 2), "preference")
    mix = merge(MergeSpec((str(text.path), str(chat.path)), "temperature"), folder / "mix")
    return {"text": text, "chat": chat, "mix": mix, "pairs": pairs}


def test_lengths() -> None:
    found = describe(np.array([1, 2, 2, 3, 4, 5, 8, 9]))
    assert found.bins == [1, 2, 4, 8, 16] and (found.p50, found.p90, found.largest) == (4, 9, 9)
    assert found.documents == pytest.approx([1 / 8, 2 / 8, 2 / 8, 2 / 8, 1 / 8])
    assert found.tokens == pytest.approx([1 / 34, 4 / 34, 7 / 34, 13 / 34, 9 / 34])
    assert describe(np.array([1])).bins == [1] and describe(np.array([16])).bins[-1] == 16


@pytest.mark.parametrize("packing", get_args(PackingName))
@pytest.mark.parametrize("name", ["text", "chat"])
def test_rows_are_those_of_training(stores: dict[str, Store], name: str, packing: str) -> None:
    store = stores[name]
    loader = Loader(store, SEQ_LEN, seed=None, packing=packing)
    found = look(store, SEQ_LEN, packing).packings[0]
    assert found[:3] == (packing, len(loader), loader.packing.efficiency)
    assert found[3:6] == (loader.packing.cut_documents, loader.packing.dropped_documents, loader.packing.dropped_tokens)
    assert found.wait is not None and 0 <= found.wait < 1
    for row in range(len(loader)):
        expected = loader.row(row)
        pieces = row_pieces(store, row, SEQ_LEN, packing)
        ids = np.concatenate([piece.ids() for piece in pieces])
        learned = np.concatenate([piece.learned() for piece in pieces])
        assert np.array_equal(expected["input_ids"][: len(ids)], ids)
        assert np.array_equal(expected["labels"][: len(ids)] != -100, learned)
        assert sum(piece.length for piece in pieces) == len(ids) and not (expected["labels"][len(ids) :] != -100).any()
    with pytest.raises(MoaiError, match=f"there are {len(loader)} rows of 32 tokens"):
        row_pieces(store, len(loader), SEQ_LEN, packing)
    with pytest.raises(MoaiError, match="counted from 0"):
        row_pieces(store, -1, SEQ_LEN, packing)


def test_a_merged_store_is_packed_part_by_part(stores: dict[str, Store]) -> None:
    found = look(stores["mix"], SEQ_LEN, "best-fit", every=True)
    alone = [look(stores[name], SEQ_LEN, "best-fit").packings[0] for name in ("text", "chat")]
    assert [part.rows and part.rows.rows for part in found.parts] == [rows.rows for rows in alone]
    assert found.packings[0].rows == sum(rows.rows for rows in alone) and found.packings[0].wait is None
    assert [rows.packing for rows in found.packings] == ["best-fit", "balanced", "next-fit", "concat", "none"]
    assert sum(part.share for part in found.parts) == pytest.approx(1)
    borders = alone[0].rows
    assert row_pieces(stores["mix"], borders - 1, SEQ_LEN, "best-fit")[0].store.path.name == "text"
    assert row_pieces(stores["mix"], borders, SEQ_LEN, "best-fit")[0].store.path.name == "chat"
    for number in (0, 59, 60, 99):
        assert np.array_equal(whole_document(stores["mix"], number).ids(), stores["mix"].document(number))
    with pytest.raises(MoaiError, match="there are 100 documents"):
        whole_document(stores["mix"], 100)


@pytest.mark.parametrize("name", NAMES)
def test_the_page(stores: dict[str, Store], name: str) -> None:
    overview = look(stores[name], SEQ_LEN, "next-fit", every=True)
    text = page(overview)
    parsed = Page(text)
    assert outside(text) == [] and "<b>&x" not in text and "<b>&x" in parsed.words
    assert json.loads(parsed.data) == json.loads(json.dumps(overview.to_dict()))
    plots = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    several = len(overview.parts) > 1
    assert len(plots) == len(overview.parts) + several + 1 + bool(overview.packings)
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 10 for plot in plots)
    lengths = parsed.tables["Tokens in a document"][-1]
    last = overview.parts[-1]
    assert lengths == [last.name, *(f"{value:,}" for value in last.lengths[:4])]
    assert ('class="mark"' in text) == (overview.lengths.bins[-1] >= SEQ_LEN)
    if overview.packings:
        rows = parsed.tables["What each way of packing makes"][1:]
        assert [row[:3] for row in rows] == [[r.packing, f"{r.rows:,}", f"{r.fullness:.1%}"] for r in overview.packings]
        (bars,) = [
            plot["aria-label"] or "" for plot in plots if (plot["aria-label"] or "").startswith("Share of the rows")
        ]
        assert all(f"{r.packing} {r.fullness:.1%}" in bars for r in overview.packings)
    assert (f"Merged: {overview.strategy}" in parsed.tables) == several


def test_the_bars_are_as_high_as_their_numbers(stores: dict[str, Store]) -> None:
    lengths = look(stores["text"], SEQ_LEN, "best-fit").lengths
    text = page(look(stores["text"], SEQ_LEN, "best-fit"))
    bars = re.findall(r'<rect class="c0( pale)?"[^>]*height="([\d.]+)"><title>[^:]+ tokens: ([\d.]+)% of the', text)
    shown = [share for share in (*lengths.documents, *lengths.tokens) if share > 0]
    assert [float(percent) for _, _, percent in bars] == pytest.approx([100 * share for share in shown], abs=0.051)
    heights = [float(height) for _, height, _ in bars]
    assert heights == pytest.approx([share * max(heights) / max(shown) for share in shown], abs=0.11)


def test_the_page_fits_on_a_phone(stores: dict[str, Store], tmp_path: Path) -> None:
    seen = measured(page(look(stores["mix"], SEQ_LEN, "best-fit", every=True)), tmp_path, 360, MEASURE)
    assert seen["wide"] <= 360 and seen["plots"] == 5 and seen["smallest"] > 10
