"""Text that every machine with Python already has, and what ships with this package: instructions, and a sample of
text to measure tokenizers on.

The text is the standard library's own: the language reference behind `help()`, the docstrings of its modules, and
their source. The instructions (ko, en, ja, zh; finance and everyday questions) were written for this project.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moai_llm.data.sft import Messages, read_conversations
from moai_llm.data.sources import read_records

INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"
SAMPLE = Path(__file__).parent / "sample.jsonl"
PARALLEL = ("en", "ko", "ja", "zh")  # labels of the sample whose documents are translations of each other, in order
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
LARGEST_SOURCE = 40_000  # bytes of a module's source that are still worth reading as one document


def library_texts() -> Iterator[tuple[str, str]]:
    """(text, place) of the language reference, then of each module its documentation and, unless it is long, its
    source.
    """
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield text, f"pydoc topic {name}"
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root)
        if LEFT_OUT & set(inside.parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            documentation = _docstrings(source)
        except (UnicodeDecodeError, SyntaxError, OSError):
            continue
        if documentation:
            yield documentation, f"documentation of {inside}"
        if len(source) <= LARGEST_SOURCE:
            yield source, f"source of {inside}"


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, under their names."""
    parts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                parts.append(text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}")
    return "\n\n".join(parts)


def instructions() -> Iterator[tuple[Messages, str]]:
    """(messages, place) of the embedded instruction set."""
    return read_conversations(read_records([INSTRUCTIONS]))


def sample_texts() -> dict[str, list[str]]:
    """Label -> documents of the embedded sample: languages and domains, a few kilobytes each."""
    texts: dict[str, list[str]] = {}
    for record in read_records([SAMPLE]):
        texts.setdefault(record.columns["label"], []).append(record.columns["text"])
    return texts
