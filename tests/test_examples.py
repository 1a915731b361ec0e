"""Every example runs, offline and in an empty directory, and shows what it says it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
LONGEST = 80  # lines; an example is read in one go


def numbers(pattern: str, output: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, output)]


def falls(losses: list[float], by: float) -> None:
    assert len(losses) >= 3 and losses[-1] < losses[0] - by, losses


def quickstart(output: str) -> None:
    pretraining, fine_tuning = (numbers(rf"train \d+/{steps}  loss ([\d.]+)", output) for steps in (30, 80))
    falls(pretraining, 0.5)
    falls(fine_tuning, 3)
    assert "Seoul." in output and "bits per byte" in output


def hybrid(output: str) -> None:
    falls(numbers(r"loss ([\d.]+)", output), 0.8)
    assert "layers: linear_attention, linear_attention, linear_attention, full_attention" in output
    assert "The statement" in output


def moe(output: str) -> None:
    """Without the Switch loss some expert takes most tokens, with it the shares stay together."""
    without, balanced = (numbers(r"spread ([\d.]+)", half) for half in output.split("coefficient")[1:])
    assert len(without) == len(balanced) == 4 and balanced[-1] < 0.5 < without[-1]
    falls(numbers(r"next token ([\d.]+)", output), 0.5)


def transformers_trainer(output: str) -> None:
    (line,) = re.findall(r"^loss (.+)$", output, re.M)
    falls([float(loss) for loss in line.split()], 0.2)
    assert "saved and loaded as MoaiForCausalLM" in output


def convert(output: str) -> None:
    differences = numbers(r"there (\S+),", output)
    assert len(differences) == 3 and max(differences) < 1e-5
    assert numbers(r"back as \w+ (\S+)", output) == [0, 0, 0]
    assert "all weights came back bit for bit" in output and "it has no learned positions" in output


def swap_a_brick(output: str) -> None:
    falls(numbers(r"loss ([\d.]+)", output), 3)
    assert output.count("causal, and documents do not leak") == 2


CHECKS: dict[str, Callable[[str], None]] = {
    "quickstart.sh": quickstart, "hybrid.py": hybrid, "moe.py": moe, "transformers_trainer.py": transformers_trainer,
    "convert.py": convert, "swap_a_brick.py": swap_a_brick,
}  # fmt: skip


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """An example in a directory of its own, with this package before any installed one, and no network to reach."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip
    program = "bash" if name.endswith(".sh") else sys.executable
    command = [program, str(EXAMPLES / name)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str, tmp_path: Path) -> None:
    if name == "transformers_trainer.py" and find_spec("accelerate") is None:
        pytest.skip("transformers' Trainer needs accelerate, which is not installed")
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    CHECKS[name](done.stdout)


@pytest.mark.skipif(find_spec("accelerate") is not None, reason="accelerate is installed")
def test_without_accelerate_the_trainer_example_says_so(tmp_path: Path) -> None:
    done = run("transformers_trainer.py", tmp_path)
    assert done.returncode == 1 and "pip install accelerate" in done.stderr and "Traceback" not in done.stderr


def test_every_example_is_run_and_short() -> None:
    files = {path.name: path for path in EXAMPLES.iterdir() if path.is_file()}
    assert set(files) == set(CHECKS)
    assert {
        name: length for name, path in files.items() if (length := len(path.read_text().splitlines())) >= LONGEST
    } == {}


def test_controls_a_loss_that_does_not_fall_is_seen() -> None:
    with pytest.raises(AssertionError):
        falls([5.0, 5.1, 4.9], by=0.5)
    with pytest.raises(AssertionError):
        hybrid("loss 6.9\nloss 6.9\nloss 6.9")
