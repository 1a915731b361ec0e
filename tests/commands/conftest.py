"""Run the command line inside a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moai_llm.cli import main

Moai = Callable[..., str]


@pytest.fixture
def moai(capsys: pytest.CaptureFixture[str]) -> Moai:
    """Run a command and return what it printed."""

    def run(*arguments: object) -> str:
        main([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Moai:
    """Run a command that must fail and return its message."""

    def run(*arguments: object, code: int = 1) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        message = capsys.readouterr().err + (left.value.code if isinstance(left.value.code, str) else "")
        assert (1 if isinstance(left.value.code, str) else left.value.code) == code, message
        assert "Traceback" not in message
        return message

    return run
