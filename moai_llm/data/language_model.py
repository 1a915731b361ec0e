"""The model of py3langid, so opened that it takes little memory of each worker.

The library reads its tables into 75 MB. Here they lie in files that have no name any more and are mapped from there,
and every so many texts the pages that were touched are given back.
"""

from __future__ import annotations

import lzma
import mmap
import os
import shutil
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moai_llm.runtime import MoaiError, require

TEXTS = 4  # whose pages are kept


class LanguageModel:
    """
    Raises:
        MoaiError: py3langid is not installed.
    """

    def __init__(self) -> None:
        try:
            library = require("py3langid.langid", "clean")
        except MoaiError as error:
            raise MoaiError(f"{error}; or set `language: script` or `language: en` in the clean.yaml") from None
        self._texts, self._maps = 0, []
        if os.name != "posix":  # where a file that is mapped cannot lose its name
            self._model = library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)
            return
        tables = _mapped(library.MODEL_DIR / library.MODEL_FILE)
        self._maps = [tables["ptc"].base, tables["nextmove"].base]
        next_state, row, feature = (memoryview(tables[name]) for name in ("nextmove", "nextmove_row", "out_feat"))
        classes, priors = tables["classes"].tolist(), np.array(tables["pc"])
        self._model = library.LanguageIdentifier(
            tables["ptc"], priors, classes, next_state, feature, norm_probs=True, tk_row=row
        )

    def __call__(self, text: str) -> tuple[str, float]:
        """(ISO 639 code, probability)."""
        code, probability = self._model.classify(text)
        self._texts += 1
        if self._texts % TEXTS == 0 and hasattr(mmap, "MADV_DONTNEED"):
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)  # they are read again from the system's cache of files
        return str(code), float(probability)


@lru_cache(maxsize=1)
def language_model() -> LanguageModel:
    """The one of this process."""
    return LanguageModel()


def _mapped(packed: Path) -> dict[str, Any]:
    """The arrays of an .npz.xz by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with lzma.open(packed) as source, (folder / "model.npz").open("wb") as unpacked:
            shutil.copyfileobj(source, unpacked, 1 << 20)
        with zipfile.ZipFile(folder / "model.npz") as archive:
            archive.extractall(folder)
        return {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
