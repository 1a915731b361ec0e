"""`moai plan`: what it prints, and the message each mistake gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moai_llm.planning.scenarios import SCENARIOS
from tests.commands.conftest import Moai

TINY = ("plan", "moai-3b-tiny")


def test_a_plan_for_some_devices(moai: Moai) -> None:
    output = moai("plan", "moai-3b", "--hardware", "8xA100-80GB", "--tokens", "60e9", "--price", 2)
    assert "3,001,401,088" in output and "1.14 times the 6N rule" in output
    for layout in ("ddp", "zero-1", "zero-2", "zero-3", "tensor 4", "pipeline 8"):
        assert re.search(rf"^{layout} +\d+\.\d\d .* fits", output, re.MULTILINE), layout
    found = re.search(r"take +ddp, train.micro_batch_size=(\d+), (\d+) of them a step", output)
    assert found and int(found[1]) * int(found[2]) == 4194304 // 4096 // 8
    assert re.search(r"14\.\d days for 60B tokens at 40% of the peak .*device-hours, \$5,\d{3}", output)
    assert "one device: the other layouts are arithmetic" in output


def test_without_hardware_there_are_no_days(moai: Moai) -> None:
    output = moai("plan", "moai-mamba-2b", "--context", 100000)
    assert "days" not in output and "2 x 256" in output and "6.75 MiB of state a sequence of 100,000 tokens" in output


def test_tables_fit_80_columns(moai: Moai) -> None:
    """Lines of prose wrap by themselves on a terminal."""
    for arguments in (("plan", "moai-3b", "--hardware", "8xA100-80GB"), ("plan", "--scenario", "all", "--price", 2)):
        rows = [line.rstrip() for line in moai(*arguments).splitlines() if re.search(r"\d  +\S+ ", line)]
        assert len(rows) >= 6 and max(map(len, rows)) <= 80


def test_numbers_for_programs(moai: Moai) -> None:
    tree = json.loads(moai(*TINY, "--hardware", "L4", "--json", "optim.lr=1e-3", "--micro-batch", 2))
    assert tree["parameters"]["total"] == 160_448 and tree["recommended"]["micro_batch_size"] == 2
    assert tree["tokens"] == 100 * 512 and tree["seconds"] > 0 and tree["cost"] is None
    rows = json.loads(moai("plan", "--scenario", "all", "--json", "--mfu", 0.5))
    assert [row["scenario"] for row in rows] == list(SCENARIOS)
    assert rows[0]["ends"][1]["published_days"] == 15 and rows[0]["ends"][1]["cost"] is None


def test_the_documents_recipes(moai: Moai) -> None:
    output = moai("plan", "--scenario", "intermediate", "--price", 2)
    assert "moai-3b on 8xA100-80GB" in output and "The documents' recipe Intermediate" in output
    assert re.search(r"100B on 8xA100-80GB +23\.7 +7 +136% +\$9,1\d\d +\$20,000", output)
    other = moai("plan", "moai-2b", "--scenario", "basic", "--tokens", "1e9")
    assert "moai-2b on 2xA100-80GB" in other and "for 1B tokens" in other and "documents' recipe" not in other


def test_when_nothing_fits(moai: Moai) -> None:
    output = moai("plan", "moai-2b", "--hardware", "RTX-3090")
    assert "nothing fits 1xRTX-3090 with 10% left free. Change, in this order:" in output
    assert re.search(r"zero-3, .* fits: --hardware \d+xRTX-3090", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan",), "which recipe?"),
        (("plan", "moai-3c"), "did you mean 'moai-3b'"),
        ((*TINY, "optim.learning_rate=1"), "here it is optim.lr"),
        ((*TINY, "--hardware", "H100"), "H100-SXM or H100-PCIe"),
        ((*TINY, "--peak-tflops", 100), "without --memory"),
        ((*TINY, "--mfu", 1.5), "at most 1"),
        ((*TINY, "--micro-batch", 0), "--micro-batch must be at least 1"),
        (("plan", "moai-3b", "--scenario", "all"), "leave out RECIPE"),
        (("plan", "--scenario", "all", "--hardware", "L4"), "leave out --hardware"),
        ((*TINY, "--hardware", "L4", "--calibrate", "--steps", 1), "says nothing about 1xL4"),
        ((*TINY, "--calibrate", "train.init_from=x"), "set data.train"),
    ],
)  # fmt: skip
def test_mistakes(fails: Moai, arguments: tuple[object, ...], message: str) -> None:
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    "flags", [("--mfu", "0"), ("--reserve", "1"), ("--tokens", "-1"), ("--price", "x"), ("--scenario", "cheap")]
)
def test_values_out_of_range(moai: Moai, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        moai(*TINY, *flags)
    assert flags[0] in capsys.readouterr().err


def test_calibrating_on_random_tokens(moai: Moai) -> None:
    output = moai(*TINY, "--calibrate", "--steps", 3, "--tokens", "1e6", "train.precision=fp32", "train.device=cpu")
    found = re.search(r"3 steps of 8 rows on this CPU, random tokens: ([\d,]+) tokens/s", output)
    assert found and f"at {found[1]} measured tokens/s a device" in output
    difference = re.search(r"MiB predicted \(([+-][\d.]+)%\)", output)
    assert difference and abs(float(difference[1])) < 10
    assert "of the peak" not in output  # a CPU's is not known


def test_calibrating_on_a_store(moai: Moai, tmp_path: Path, text_file: Path) -> None:
    moai("tokenizer", "train", text_file, "--vocab-size", 300, "--out", tmp_path / "tok")
    moai("data", "prepare", text_file, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "text")
    output = moai(
        *TINY, "--calibrate", "--steps", 2, f"data.train={tmp_path / 'text'}", "train.precision=fp32",
        "train.device=cpu", "--json",
    )  # fmt: skip
    tree = json.loads(output)
    assert tree["options"]["tokens_per_second"] > 0 and 1 <= tree["options"]["document_tokens"] <= 64
    assert tree["parameters"]["embedding"] == 384 * 64  # 300 tokens, in rows of 128
    assert 0.9 < tree["options"]["memory_factor"] < 1.1
