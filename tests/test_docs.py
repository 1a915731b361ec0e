"""The documents say what is true: commands parse, links and names resolve, tables agree with the code, examples run."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from moai_llm import recipe as recipes
from moai_llm.cli import COMMANDS, main
from moai_llm.data.clean import config_from_tree
from moai_llm.tokenizer import Tokenizer
from tests.command_lines import Block, check, fenced_blocks, moai_commands, shell_commands
from tests.conftest import ROOT, tiny_model

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *PAGES]
RUN, STEP_BY_STEP = "<!-- run -->", "<!-- step by step -->"
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
# the migration page also names what is no longer there
every_present_document = pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.name != "migration.md"], ids=lambda path: path.name
)


def prose(text: str) -> str:
    """A Markdown text without its fenced blocks."""
    lines = text.splitlines()
    for block in fenced_blocks(text):
        for i in range(block.line - 2, block.line + len(block.text.splitlines())):
            lines[i] = ""
    return "\n".join(lines)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def marked(text: str, mark: str) -> list[Block]:
    """The fenced blocks under an HTML comment."""
    lines = text.splitlines()
    return [block for block in fenced_blocks(text) if block.line >= 3 and lines[block.line - 3] == mark]


# ---------------------------------------------------------------- commands


@every_document
def test_command_lines_parse(path: Path) -> None:
    for command in moai_commands(path.read_text(encoding="utf-8")):
        check(command.words)


def test_there_are_command_lines() -> None:
    assert sum(len(list(moai_commands(path.read_text(encoding="utf-8")))) for path in DOCUMENTS) > 40


@pytest.mark.parametrize(
    "line",
    [
        "moai trian moai-3b-tiny",
        "moai train moai-3b-tiny train.stepz=3",
        "moai train mine.yaml optim.learning=1",
        "moai train RECIPE tarin.steps=1",
        "moai chat runs/x --temprature 0",
        "moai data prepare my_text/ --out work/text",
        "cat prompt.txt | python -m moai_llm generate runs/x > out.txt",
        "moai ops && \\\n  moai tokenizer trane x",
    ],
)
def test_a_broken_command_line_is_caught(line: str) -> None:
    commands = list(moai_commands(f"text\n\n```bash\n# a comment\n{line}\n```\n"))
    with pytest.raises(ValueError):
        for command in commands:
            check(command.words)


def test_what_counts_as_a_command() -> None:
    text = (
        '```console\n$ echo "a | b" | moai chat m --seed 1 > out  # comment\nmoai printed this\n$ X=1 moai ops \\\n'
        ">   --device cpu\n```\n```python\nmoai = 1\n```\n```sh\ncat > f <<'EOF'\nmoai nonsense\nEOF\n```\n"
    )
    assert [command.words for command in moai_commands(text)] == [
        ["moai", "chat", "m", "--seed", "1"],
        ["moai", "ops", "--device", "cpu"],
    ]
    with pytest.raises(ValueError, match="never closed"):
        list(moai_commands("```bash\nmoai ops\n"))


@every_document
def test_commands_named_in_the_text_exist(path: Path) -> None:
    for code in inline_code(path.read_text(encoding="utf-8")):
        words = code.split()
        if words[0] == "moai" and len(words) > 1 and words[1].islower() and not words[1].startswith("-"):
            assert words[1] in COMMANDS, code


@every_document
def test_make_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = [command.words for command in shell_commands(text)] + [code.split() for code in inline_code(text)]
    for words in named:
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, " ".join(words)


def test_the_steps_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block as it stands, with fewer tokens and steps: what takes minutes there takes seconds here."""
    fewer = {"8000": "330", "train.steps=2000": "train.steps=2", "train.steps=300": "train.steps=2"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text").mkdir()
    text = "".join(f"Document {i} says that the deposit earns interest {i * 7}. 이자가 붙어요. " for i in range(60))
    (tmp_path / "my_text" / "a.txt").write_text(text, encoding="utf-8")
    chats = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    (block,) = marked(README.read_text(encoding="utf-8"), STEP_BY_STEP)
    replaced = set()
    for command in shell_commands(f"```bash\n{block.text}\n```"):
        words = [fewer.get(word, word) for word in command.words]
        replaced |= set(command.words) & set(fewer)
        if words[0] == "echo":
            monkeypatch.setattr("sys.stdin", io.StringIO(f"{words[1]}\n"))
            continue
        if words[1] == "train":
            words += ["data.seq_len=64", "train.batch_tokens=128", "train.micro_batch_size=2", "train.device=cpu"]
        main(words[1:])
    assert replaced == set(fewer)
    output = capsys.readouterr().out
    assert "bits per byte" in output and "Once upon a time" in output
    written = {path.name for path in (tmp_path / "work").iterdir()}
    assert written == {"tokenizer", "text", "valid", "base", "chats", "chat", "exported"}


# ---------------------------------------------------------------- links and names


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    bad = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            if not there.exists() or (anchor and anchor not in slugs(there.read_text(encoding="utf-8"))):
                bad.append(target)
    return bad


@every_document
def test_relative_links_resolve(path: Path) -> None:
    assert not broken_links(path, path.read_text(encoding="utf-8"))


def test_control_a_broken_link_is_seen() -> None:
    text = "[a](docs/nothing.md) [b](#nothing) [c](docs/models.md#nothing) [d](docs/models.md#rope) [e](https://x.y)"
    assert broken_links(README, text) == ["docs/nothing.md", "#nothing", "docs/models.md#nothing"]


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [next(iter(item.values())) for item in site["nav"]]
    assert {path.name for path in PAGES} == set(named) and len(named) == len(set(named))


@every_present_document
def test_paths_named_in_the_text_exist(path: Path) -> None:
    for code in inline_code(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"(moai_llm|tests|benchmarks|docs|\.ci)/[\w./-]*", code) and "NAME" not in code:
            assert (ROOT / code).exists(), code


@every_present_document
def test_python_names_exist(path: Path) -> None:
    for code in inline_code(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"moai_llm(\.\w+)+", code):
            assert resolves(code), code


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for name in parts[i:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def test_control_names_that_do_not_exist() -> None:
    assert resolves("moai_llm.modeling.decoder.TOKEN_MIXERS") and resolves("moai_llm.config")
    assert not resolves("moai_llm.modeling.decoder.MIXERS") and not resolves("moai_llm.nothing")


def test_names_contributors_are_sent_to_exist() -> None:
    text = " ".join(prose(CONTRIBUTING.read_text(encoding="utf-8")).split())
    places = re.findall(r"`([\w.]+)` in `([\w./-]+\.py)`", text)
    assert len(places) >= 10
    for name, file in places:
        last, source = name.split(".")[-1], (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(class |def )?{last}\b", source, re.MULTILINE), f"{name} in {file}"


@dataclass
class Tree:
    """The tree of the README: entries of the root and of the package, and the files listed under a room."""

    root: list[str]
    package: list[str]
    files: dict[str, list[str]]


def read_tree(text: str) -> Tree:
    (block,) = [block for block in fenced_blocks(text) if block.text.startswith("moai_llm/\n")]
    tree = Tree([], [], {})
    for line in block.text.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0].rstrip("/")
        if indent == 0:
            tree.root.append(name)
        elif indent == 2:
            tree.package.append(name)
        else:
            tree.files.setdefault(tree.package[-1], []).extend(line.split())
    return tree


def differences(tree: Tree) -> list[str]:
    """What a tree names that is not there, and what is there without being named."""
    package = ROOT / "moai_llm"
    bad = [name for name in tree.root if not (ROOT / name).exists()]
    bad += set(tree.package) ^ {path.name for path in package.iterdir() if path.name != "__pycache__"}
    for room in sorted(path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"):
        if room.name != "recipes":
            there = {path.name for path in room.iterdir() if path.name not in ("__init__.py", "__pycache__")}
            bad += [f"{room.name}/{name}" for name in set(tree.files.get(room.name, [])) ^ there]
    return sorted(bad)


def test_the_tree_is_what_lies_there() -> None:
    assert not differences(read_tree(README.read_text(encoding="utf-8")))


def test_control_a_wrong_tree_is_seen() -> None:
    text = README.read_text(encoding="utf-8")
    wrong = {
        "dispatch.py  ": ("despatch.py  ", ["ops/despatch.py", "ops/dispatch.py"]),
        "  losses.py  ": ("  lasses.py  ", ["lasses.py", "losses.py"]),
        "\nbenchmarks/ ": ("\nbenchmark/  ", ["benchmark"]),
    }
    for right, (changed, seen) in wrong.items():
        assert differences(read_tree(text.replace(right, changed))) == seen


# ---------------------------------------------------------------- tables


def test_the_table_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "--markdown"])
    assert capsys.readouterr().out.strip() in README.read_text(encoding="utf-8")


def test_the_guide_to_learning_rates(capsys: pytest.CaptureFixture[str]) -> None:
    from moai_llm.training.lr_guide import NAMES, PUBLISHED

    main(["recipes", "--lr-guide", "--markdown"])
    text = (ROOT / "docs" / "optimization.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text
    for value in PUBLISHED:
        assert f"| {NAMES[value.kind]} | {value.model} | {value.lr:.1e} | {value.source} |" in text


def test_the_tables_of_optimizers_schedules_and_clips() -> None:
    from moai_llm.optimization import OPTIM_OPTIONS

    text = (ROOT / "docs" / "optimization.md").read_text(encoding="utf-8")
    for name, options in OPTIM_OPTIONS.items():
        (row,) = re.findall(rf"^\| `{name}` \| [^|]+ \| [^|]+ \| ([^|]*)\|$", text, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == set(options), name
    for section in (recipes.ScheduleConfig, recipes.ClipConfig):
        for name in get_args(get_type_hints(section)["name"]):
            assert f"\n| `{name}` |" in text


def key_rows(page: str) -> dict[str, str]:
    """Key -> default, of the table of keys of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (table,) = re.findall(r"\| key \| default \| meaning \|\n\|[ |-]+\|\n((?:\|.*\n)+)", text)
    rows = re.findall(r"^\| `([\w.]+)` \| (unset|`[^`]*`) \| [^|]+ \|$", table, re.MULTILINE)
    assert len(rows) == len(table.splitlines())
    return dict(rows)


def test_the_tables_of_keys() -> None:
    """Every key with its default, and no others."""
    tree = recipes.to_tree(recipes.Recipe())
    model = {key: shown(value) for key, value in tree["model"].items()}
    assert key_rows("models.md") == model
    others = {name: section for name, section in tree.items() if name != "model" and isinstance(section, dict)}
    keys = {f"{name}.{key}": shown(value) for name, section in others.items() for key, value in section.items()}
    assert key_rows("training.md") == keys


def shown(value: object) -> str:
    return "unset" if value is None else f"`{json.dumps(value)}`"


def test_the_table_of_losses() -> None:
    import inspect

    from moai_llm.losses import LOSSES

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name, make in LOSSES.items():
        defaults = [f"`{p.name}: {json.dumps(p.default)}`" for p in inspect.signature(make).parameters.values()]
        assert f"| `{name}` | {', '.join(defaults)} |" in text


def test_what_can_be_read() -> None:
    from moai_llm.data.sft import SCHEMAS
    from moai_llm.data.sources.columns import TEXT_COLUMNS
    from moai_llm.data.sources.files import ARCHIVES, FORMATS, SHORT
    from moai_llm.data.sources.git import KEYS
    from moai_llm.data.sources.streams import COMPRESSIONS

    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = (*FORMATS, *ARCHIVES, *SHORT, *COMPRESSIONS, *TEXT_COLUMNS)
    assert not [name for name in names if f"`{name}`" not in text]
    assert not [key for key in KEYS if f"| `{key}=" not in text]
    for schema in SCHEMAS.values():
        assert ", ".join(f"`{column}`" for column in schema.required) in text


def test_the_table_of_rope_types() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| `rope_type` \| what it does \|\n\|[ |-]+\|\n((?:\|.*\n)+)", text)
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) <= {"default", "ntk", *ROPE_INIT_FUNCTIONS}


def test_the_table_of_ops() -> None:
    from moai_llm.ops.dispatch import all_ops

    rows = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    for name, op in all_ops().items():
        (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
        assert not [key for key in op.implementations if key != "reference" and f"`{key}`" not in row]


# ---------------------------------------------------------------- examples


def blocks(language: str) -> list[object]:
    return [
        pytest.param(path, block, id=f"{path.name}:{block.line}")
        for path in DOCUMENTS
        for block in fenced_blocks(path.read_text(encoding="utf-8"))
        if block.language == language
    ]


@pytest.mark.parametrize(("path", "block"), blocks("python"))
def test_python_compiles_and_imports(path: Path, block: Block) -> None:
    compile(block.text, f"{path.name}:{block.line}", "exec")
    for module, names in re.findall(r"^from (moai_llm[\w.]*) import ([\w, ]+)", block.text, re.MULTILINE):
        for name in names.split(","):
            assert resolves(f"{module}.{name.split(' as ')[0].strip()}"), name


@pytest.mark.parametrize(("path", "block"), blocks("yaml"))
def test_yaml_is_a_recipe(path: Path, block: Block) -> None:
    """A recipe, or what its first line calls a clean.yaml."""
    read = config_from_tree if block.text.startswith("# clean.yaml") else recipes.from_tree
    read(yaml.safe_load(block.text), f"{path.name}:{block.line}")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with a tiny chat model where the examples expect one: runs/quickstart/model."""
    folder = tmp_path_factory.mktemp("examples")
    model = tiny_model("full_attention", "dense", vocab_size=tokenizer.padded_vocab_size).float()
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_id, tokenizer.pad_id
    model.save_pretrained(folder / "runs" / "quickstart" / "model")
    tokenizer.save(folder / "runs" / "quickstart" / "model")
    return folder


@pytest.mark.parametrize(
    ("path", "block"),
    [
        pytest.param(path, block, id=f"{path.name}:{block.line}")
        for path in DOCUMENTS
        for block in marked(path.read_text(encoding="utf-8"), RUN)
    ],
)
def test_python_runs(path: Path, block: Block, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder)
    exec(compile(block.text, f"{path.name}:{block.line}", "exec"), {"__name__": "example"})


def test_importing_the_package_is_enough_for_auto_classes(model_folder: Path) -> None:
    """Before transformers, after it, and without asking for a class of ours."""
    wanted = {"AutoConfig": "MoaiConfig", "AutoModel": "MoaiModel", "AutoModelForCausalLM": "MoaiForCausalLM"}
    ours, theirs = "import moai_llm", f"from transformers import {', '.join(wanted)}"
    use = f"for c in ({', '.join(wanted)}): print(type(c.from_pretrained('runs/quickstart/model')).__name__)"
    for lines in ([ours, theirs, use], [theirs, ours, use]):
        done = run_python("\n".join(lines), model_folder)
        assert done.stdout.split() == list(wanted.values()), done.stderr


def test_the_package_does_not_disturb_an_import_of_transformers_from_its_middle(tmp_path: Path) -> None:
    """A model file of transformers imports the Auto classes before it is complete itself."""
    code = """
import moai_llm
from transformers.models.mamba import modeling_mamba
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("moai", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "MoaiForCausalLM", done.stderr


def test_control_without_the_package_auto_classes_do_not_know_it(model_folder: Path) -> None:
    code = "from transformers import AutoConfig\nAutoConfig.from_pretrained('runs/quickstart/model')"
    assert "moai" in run_python(code, model_folder).stderr


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
