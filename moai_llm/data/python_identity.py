"""When two Python files are the same program: their syntax trees are equal, whatever their format and comments."""

from __future__ import annotations

import ast
import builtins
import hashlib
import warnings

_NAMES = {  # (node, field) that binds or reads a name of the program itself; attributes and modules are not its own
    ("Name", "id"), ("arg", "arg"), ("FunctionDef", "name"), ("AsyncFunctionDef", "name"), ("ClassDef", "name"),
    ("alias", "asname"), ("ExceptHandler", "name"), ("MatchAs", "name"), ("MatchStar", "name"),
}  # fmt: skip
_KEPT = frozenset(dir(builtins))
_SKIPPED = {"ctx", "kind", "type_comment", "type_ignores"}  # they follow from the rest, or are comments


def python_identity(text: str, rename: bool = False) -> bytes | None:
    """16 bytes that are equal for equal programs; None for text that is not Python (of this interpreter's version).

    Args:
        rename: variables, parameters, functions and classes are numbered by their first use, so that renamed copies are
            equal too. Attributes, keywords, modules and names of Python's own stay: they say what a program does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a strange escape in foreign code is no concern of ours
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not tree.body:
        return None
    digest, numbers = hashlib.blake2b(digest_size=16), dict[str, int]()
    stack: list[object] = [tree]
    while stack:  # trees of generated code are deeper than the stack of calls
        item = stack.pop()
        if isinstance(item, ast.AST):
            digest.update(f"({type(item).__name__}".encode())
            stack.append(_END)
            for field, value in reversed(list(ast.iter_fields(item))):
                if field in _SKIPPED or value is None or value == []:  # absent is the same in every version of Python
                    continue
                if rename and isinstance(value, str) and (type(item).__name__, field) in _NAMES:
                    value = _number(value, numbers)
                elif rename and isinstance(item, (ast.Global, ast.Nonlocal)):
                    value = [_number(name, numbers) for name in item.names]
                stack += [value, _Field(field)]
        elif isinstance(item, list):
            digest.update(f"[{len(item)}".encode())
            stack += reversed(item)
        elif isinstance(item, _Field):
            digest.update(f" {item} ".encode())
        else:
            digest.update(b")" if item is _END else f"{type(item).__name__}:{item!r};".encode("utf-8", "replace"))
    return digest.digest()


def _number(name: str, numbers: dict[str, int]) -> str | int:
    if name in _KEPT or (name.startswith("__") and name.endswith("__")):
        return name
    return numbers.setdefault(name, len(numbers))


class _Field(str):
    """The name of a field, to tell it from a value."""


_END = object()
