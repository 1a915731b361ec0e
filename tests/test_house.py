"""The rules of the house, read from the source: floors, file length, names, and what start-up may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moai_llm

PACKAGE = Path(moai_llm.__file__).parent
FLOORS = [
    ["runtime", "bounds", "synonyms"],
    ["ops", "architecture", "mixture", "optimization", "representation", "pages"],
    ["config", "losses"],
    ["recipe", "tokenizer", "modeling"],
    ["data", "quantization", "planning"],
    ["training", "inference"],
    ["evaluation", "export"],
    ["commands", "cli"],
    ["__main__", "__init__"],
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            if node.module == "moai_llm":
                names += [f"moai_llm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def upward_imports(files: list[Path], source_of=Path.read_text) -> list[str]:  # type: ignore[no-untyped-def]
    bad = []
    for path in files:
        here = room_of(path)
        for name in imports(ast.parse(source_of(path))):
            there = name.split(".")[1] if name.startswith("moai_llm.") else None
            if there in FLOOR and there != here and FLOOR[there] >= FLOOR[here] and here != "__init__":
                bad.append(f"{path.relative_to(PACKAGE)} imports {name}")
    return bad


def test_imports_go_down_only() -> None:
    assert not upward_imports(FILES)


def test_the_floor_test_sees_an_upward_import() -> None:
    ops = [path for path in FILES if path.name == "dispatch.py"]
    assert upward_imports(ops, lambda path: "from moai_llm.modeling.model import MoaiModel")


def test_one_function_names_what_was_meant() -> None:
    """So that every message of a mistyped name reads the same."""
    assert {room_of(path) for path in FILES if "difflib" in imports(ast.parse(path.read_text()))} == {"runtime"}


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize(("room", "forbidden"), [("modeling", "torch.distributed"), ("ops", "transformers")])
def test_rooms_do_not_know(room: str, forbidden: str) -> None:
    bad = [
        p.name
        for p in FILES
        if room_of(p) == room and any(n.startswith(forbidden) for n in imports(ast.parse(p.read_text())))
    ]
    assert not bad


def test_files_are_short() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py")
    assert lengths[-1] <= 500
    assert lengths[len(lengths) // 2] <= 150


def test_no_utils_and_nothing_unfinished() -> None:
    assert not [path.name for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert not [path.name for path in FILES if marks.search(path.read_text())]


def test_every_module_says_what_it_is() -> None:
    assert not [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]


def test_public_names() -> None:
    assert moai_llm.__all__ == [
        "MoaiConfig", "MoaiForCausalLM", "MoaiModel", "__version__", "get_config", "get_mamba_config", "list_recipes",
        "load_model", "load_tokenizer", "sample_text",
    ]  # fmt: skip
    for name in moai_llm.__all__:
        assert getattr(moai_llm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moai_llm.nothing


@pytest.mark.parametrize(
    "code",
    [
        "import moai_llm",
        "from moai_llm.cli import main; main(['--help'])",
        "from moai_llm.cli import main; main(['recipes'])",
        "from moai_llm.cli import main; main(['recipes', 'moai-3b'])",
        "from moai_llm.cli import main; main(['plan', 'moai-3b', '--hardware', '8xA100-80GB'])",
    ],
)
def test_start_up_imports_no_torch(code: str) -> None:
    check = "import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'imported'"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "data",
        "tokenizer",
        "generate",
        "chat",
        "serve",
        "eval",
        "embed",
        "card",
        "quickstart",
        "ops",
        "doctor",
        "report",
        "plan",
        "export",
        "import",
        "bench",
    ],
)
def test_help_of_each_command_imports_no_torch(verb: str) -> None:
    code = f"""
import sys
from moai_llm.cli import main
try:
    main(['{verb}', '--help'])
except SystemExit:
    assert 'torch' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"moai {verb}" in done.stdout
