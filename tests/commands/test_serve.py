"""`moai serve` as a user meets it: a process that starts, answers, and ends; and what it says of each mistake."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.commands.serve import service_of
from moai_llm.inference.embed import embed, load_embedder
from moai_llm.inference.server.options import Options
from moai_llm.inference.server.sse import EventReader
from moai_llm.runtime import MoaiError
from tests.conftest import ROOT, tiny_model
from tests.inference.test_embed import make_embedder
from tests.tokenizer.conftest import tokenizer_for


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, tokenizer = tmp_path_factory.mktemp("serve") / "chat", tokenizer_for("chatml")
    tokenizer.save(directory)
    tiny_model(vocab_size=tokenizer.padded_vocab_size, max_position_embeddings=4096).float().save_pretrained(directory)
    return directory


def test_a_model_of_vectors_is_served_as_one(tmp_path: Path) -> None:
    path = make_embedder(tmp_path / "vectors", tokenizer_for("chatml"))
    service = service_of(path, Options(name="vectors"), "cpu", "fp32")
    assert not service.generates and service.embed is not None
    texts = ["interest", "은행 이자"]
    assert service.embed(texts) == embed(load_embedder(path, "cpu", "fp32"), texts).tolist()


def test_control_a_language_model_has_no_vectors(saved: Path) -> None:
    service = service_of(saved, Options(name="chat"), "cpu", "fp32")
    assert service.generates and service.embed is None


def ask_and_signal(port: int, pid: int, found: list[str]) -> None:
    """Ask for an answer that takes long, and send SIGTERM in the middle of it; `found` gets its events."""
    end = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/v1/models")
            break
        except ConnectionError:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "chat"
    body = json.dumps({"prompt": "secret words", "max_tokens": 4000, "temperature": 0, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer, reader = connection.getresponse(), EventReader()
    while not found:
        found += reader.push(answer.read1())
    os.kill(pid, signal.SIGTERM)
    found += reader.push(answer.read())
    connection.close()


def check_end(found: list[str], output: str) -> None:
    last = json.loads(found[-2])
    assert found[-1] == "[DONE]"
    if "error" in last:  # else its answer ended by itself within the grace time
        assert last["error"]["code"] == "server_shutdown"
    assert "stopping: running answers (1)" in output and "Traceback" not in output and "secret" not in output
    assert "POST /v1/completions 200" in output


LIMITS = ("--grace", "0.3", "--max-new-tokens", "4000", "--device", "cpu")


def test_a_signal_ends_a_server(
    saved: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[str] = []
    asking = threading.Thread(target=ask_and_signal, args=(port, os.getpid(), found))
    asking.start()
    before = signal.getsignal(signal.SIGTERM)
    main(["serve", str(saved), "--port", str(port), *LIMITS])  # it returns
    asking.join(30)
    output = capsys.readouterr().out
    assert f"chat at http://127.0.0.1:{port}: a page" in output and signal.getsignal(signal.SIGTERM) is before
    check_end(found, output + caplog.text)


@pytest.mark.slow
def test_a_process_that_is_told_to_end(saved: Path) -> None:
    command = [sys.executable, "-m", "moai_llm", "serve", str(saved), "--port", "0", *LIMITS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )
    found: list[str] = []
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert match, line + process.stdout.read()
        ask_and_signal(int(match[1]), process.pid, found)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    check_end(found, output)


def test_mistakes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOAI_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="no API key: set MOAI_API_KEY"):
        main(["serve", str(saved), "--host", "0.0.0.0"])
    with pytest.raises(SystemExit, match="--max-batch is out of range"):
        main(["serve", str(saved), "--max-batch", "0"])
    with pytest.raises(SystemExit, match="no such directory"):
        main(["serve", str(saved / "nothing"), "--port", "0"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1, port {port}: .*--port chooses another"):
            main(["serve", str(saved), "--port", port])


def test_what_is_missing_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=re.escape("pip install 'moai-llm[serve]'")):
        main(["serve", str(saved)])


def test_a_model_that_the_engine_cannot_run_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moai_llm.inference.server import service

    def refuse(*_: object, **__: object) -> None:
        raise MoaiError("this is a GPT2LMHeadModel, which the engine cannot run in batches")

    monkeypatch.setattr(service, "Engine", refuse)
    with pytest.raises(SystemExit, match="moai serve: this is a GPT2LMHeadModel"):
        main(["serve", str(saved), "--port", "0", "--device", "cpu"])
