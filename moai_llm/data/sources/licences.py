"""Which licence a file is under, as far as that can be read: SPDX identifiers in lower case."""

from __future__ import annotations

import re

# identifier -> words of the licence, white space as one blank; the first whose words are all there. The licences of GNU
# name one another, but only their own titles have the version behind the name.
PHRASES: dict[str, tuple[str, ...]] = {
    "agpl-3.0": ("gnu affero general public license version 3",),
    "lgpl-3.0": ("gnu lesser general public license version 3",),
    "lgpl-2.1": ("gnu lesser general public license version 2.1",),
    "gpl-3.0": ("gnu general public license version 3",),
    "gpl-2.0": ("gnu general public license version 2",),
    "mpl-2.0": ("mozilla public license version 2.0",),
    "epl-2.0": ("eclipse public license - v 2.0",),
    "apache-2.0": ("apache license version 2.0",),
    "bsl-1.0": ("boost software license",),
    "bsd-3-clause": ("redistribution and use in source and binary forms", "endorse or promote products"),
    "bsd-2-clause": ("redistribution and use in source and binary forms",),
    "mit": ("permission is hereby granted, free of charge", "the above copyright notice and this permission notice"),
    "psf-2.0": ("python software foundation license version 2",),
    "isc": ("permission to use, copy, modify, and/or distribute this software", "provided that the above copyright"),
    "0bsd": ("permission to use, copy, modify, and/or distribute this software", "with or without fee"),
    "zlib": ("this software is provided 'as-is'", "altered source versions must be plainly marked"),
    "unlicense": ("this is free and unencumbered software released into the public domain",),
    "cc0-1.0": ("cc0 1.0 universal",),
    "cc-by-sa-4.0": ("attribution-sharealike 4.0",),
    "cc-by-nc-4.0": ("attribution-noncommercial 4.0",),
    "cc-by-4.0": ("attribution 4.0 international",),
}
NAMES = (*PHRASES, "unknown")
SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+-]+)")


def licence_of_text(text: str) -> str:
    """The licence that a LICENSE file holds, "unknown" for none of the list."""
    words = " ".join(text[:20000].lower().split())
    return next((name for name, phrases in PHRASES.items() if all(phrase in words for phrase in phrases)), "unknown")


def licence_of_file(text: str) -> str | None:
    """The licence that the head of a source file names after `SPDX-License-Identifier:`."""
    found = SPDX.search(text[:2000])
    return re.sub(r"-(only|or-later)$|\+$", "", found[1].lower()) if found else None
