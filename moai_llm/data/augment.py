"""Two views of one text, for texts that stand alone: what was made of the same text belongs together.

Tokens are cropped or left out while batches are made, anew in each pass; a pure function of the generator it is given.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Augment = Literal["none", "twins", "crop", "delete"]
SHARES = {"crop": 0.5, "delete": 0.1}  # what `embedding.augment_share` is where it is not set


def view(ids: np.ndarray, augment: Augment, share: float | None, generator: np.random.Generator) -> np.ndarray:
    """One view of a text's tokens, in their order; at least one token, where there is one.

    Args:
        ids: (tokens,) without the end-of-text token.
        augment: `crop` is one stretch, independent of that of the other view (Contriever, arXiv 2112.09118, section
            3.1); `delete` leaves tokens out (arXiv 2006.03659 and others); `twins` is the text itself, which dropout
            then changes (SimCSE, arXiv 2104.08821, section 3).
        share: of `crop` the least that is kept, of `delete` the chance of each token to be left out.
    """
    if augment not in SHARES or not len(ids):
        return ids
    share = SHARES[augment] if share is None else share
    if augment == "crop":
        size = max(1, round(len(ids) * generator.uniform(share, 1)))
        start = int(generator.integers(len(ids) - size + 1))
        return ids[start : start + size]
    kept = generator.random(len(ids)) >= share
    kept[int(generator.integers(len(ids)))] = True
    return ids[kept]
