"""What docs/serving.md says of the server: its examples run, and its tables are those of the code."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess

import pytest

from moai_llm.commands import serve
from moai_llm.inference.server.app import API, OPEN
from moai_llm.inference.server.metrics import Metrics
from moai_llm.inference.server.protocol import ChatRequest, CompletionRequest, Generation
from tests.command_lines import fenced_blocks
from tests.conftest import ROOT
from tests.inference.server.conftest import Served

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
LINES = TEXT.splitlines()
EXAMPLES = [block for block in fenced_blocks(TEXT) if LINES[block.line - 3] == "<!-- against a server -->"]


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.language)
def test_examples_run(served: Served, block, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    text = block.text.replace("http://localhost:8000", served.url)
    assert text != block.text
    if block.language == "python":
        pytest.importorskip("openai")
        names: dict[str, object] = {"__name__": "example"}
        exec(compile(text, "docs/serving.md", "exec"), names)
        names["client"].close()  # type: ignore[attr-defined]
        assert "[None, -" in capsys.readouterr().out
        return
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and '"object":"chat.completion"' in done.stdout, done.stdout + done.stderr


def test_the_table_of_options() -> None:
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    flags = {
        a.option_strings[0]: a.default for a in parser._actions if a.option_strings and a.option_strings[0] != "-h"
    }
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*?) ?\|", TEXT, re.MULTILINE))
    assert set(rows) == set(flags)
    for flag, default in flags.items():
        if default not in (None, False, []):
            assert rows[flag] == f"{default:g}" if isinstance(default, (int, float)) else rows[flag] == str(default), (
                flag
            )


def test_the_tables_of_routes_and_metrics() -> None:
    routes = set(re.findall(r"^\| `(/[\w/]*)` \|", TEXT, re.MULTILINE))
    assert routes == {route for route in API | OPEN if "." not in route}
    names = {line.split()[2] for line in Metrics().text({}, {}).splitlines() if line.startswith("# TYPE")}
    assert names | {"moai_running", "moai_waiting", "moai_up"} == set(re.findall(r"`(moai_[a-z_]+)`", TEXT))


def test_every_field_is_named() -> None:
    fields = {*Generation.model_fields, *CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert not [name for name in fields - {"model", "prompt", "messages"} if f"`{name}" not in TEXT]
