"""moai generate: one prompt, samples, beams, files that survive a kill, and the message each mistake gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.inference import prompt_file
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

PROMPTS = ["Interest is paid", "The quick brown fox", "예금과 적금은", "銀行の利子", "for i in range"]
SHORT = ["--max-new-tokens", "6", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model")
    bricks = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]}
    tiny_model(vocab_size=512, **bricks).float().save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture
def run(model: str, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*arguments: str) -> tuple[str, str]:
        code = main(["generate", model, *arguments, *SHORT])
        output = capsys.readouterr()
        assert not code, output.err
        return output.out, output.err

    return run


def failure(model: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["generate", model, *arguments])
    return str(ended.value.code)


def test_one_prompt_in_every_way(run) -> None:  # type: ignore[no-untyped-def]
    greedy = run("--prompt", "Interest is", "--temperature", "0")[0]
    assert greedy.startswith("Interest is")
    for option in (["--prompt-lookup"], ["--num-samples", "1", "--batch-size", "2"], ["--guesses", "2"]):
        assert run("--prompt", "Interest is", "--temperature", "0", *option)[0] == greedy
    several = run("--prompt", "Interest is", "--num-samples", "3", "--seed", "1")[0]
    assert (
        several.count("--- ") == 3 and several == run("--prompt", "Interest is", "--num-samples", "3", "--seed", "1")[0]
    )
    shown = run("--prompt", "Interest is", "--temperature", "0", "--logprobs", "2")[0]
    assert shown.startswith(greedy) and len(shown[len(greedy) :].strip().splitlines()) == 6
    beams = run("--prompt", "Interest is", "--num-beams", "3", "--num-samples", "2")[0]
    assert beams.count("score") == 2 and beams.count("Interest is") == 2
    stopped = run("--prompt", "Interest is", "--temperature", "0", "--stop", greedy.strip()[-1])[0]
    assert greedy.startswith(stopped.strip("\n")) and len(stopped) < len(greedy)


def test_a_draft_says_how_often_it_was_right(run, model: str) -> None:  # type: ignore[no-untyped-def]
    greedy = run("--prompt", "Interest is", "--temperature", "0")[0]
    out, err = run("--prompt", "Interest is", "--temperature", "0", "--draft", model)
    assert out == greedy and "(100%)" in err and "tokens a step" in err


def test_perplexity_of_a_text(run) -> None:  # type: ignore[no-untyped-def]
    out, _ = run("--eval-text", "Interest is paid on the deposit.")
    assert out.startswith("perplexity ") and "bits per byte" in out


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_killed_run_goes_on(run, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    prompts, whole, killed = tmp_path / "p.txt", tmp_path / f"whole{ending}", tmp_path / f"killed{ending}"
    prompts.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    options = ["--input-file", str(prompts), "--seed", "3", "--temperature", "1", "--batch-size", "2"]
    run(*options, "--output-file", str(whole))
    text = whole.read_text(encoding="utf-8")
    records = json.loads(text) if ending == ".json" else [json.loads(line) for line in text.splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS and [r["index"] for r in records] == list(range(5))
    assert all(record["tokens"] <= 6 and record["finished"] in ("stop", "length") for record in records)

    real = prompt_file.AnswerFile.adding
    done: list[int] = []

    def interrupted(self):  # type: ignore[no-untyped-def]
        context = real(self)

        class Adding:
            def __enter__(self):  # type: ignore[no-untyped-def]
                add = context.__enter__()

                def one(index: int, record: dict) -> None:
                    if len(done) == 2:
                        raise MemoryError("killed")
                    done.append(index)
                    add(index, record)

                return one

            def __exit__(self, *error):  # type: ignore[no-untyped-def]
                return context.__exit__(*error)

        return Adding()

    monkeypatch.setattr(prompt_file.AnswerFile, "adding", interrupted)
    with pytest.raises(MemoryError):
        run(*options, "--output-file", str(killed))
    monkeypatch.setattr(prompt_file.AnswerFile, "adding", real)
    partial = killed.with_name(killed.name + ".partial")
    assert not killed.exists() and len(partial.read_bytes().splitlines()) == 3
    with partial.open("ab") as file:
        file.write(b'{"index": 4, "prom')  # a kill in the middle of a line
    out, _ = run(*options, "--output-file", str(killed))
    assert "2 of 5 prompts are done" in out and killed.read_bytes() == whole.read_bytes() and not partial.exists()


def test_json_prompts_and_several_samples(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    lines = [{"prompt": PROMPTS[0]}, {"text": PROMPTS[1]}, PROMPTS[2]]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("--input-file", str(prompts), "--output-file", str(answers), "--num-samples", "2", "--logprobs", "1")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS[:3]
    for record in records:
        assert len(record["samples"]) == 2
        for sample in record["samples"]:
            assert len(sample["ids"]) == len(sample["logprobs"]) == len(sample["top"]) == sample["tokens"]


def test_mistakes(model: str, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    good = tmp_path / "p.txt"
    good.write_text("a\n" + "long " * 200)
    both = ("--input-file", str(prompts), "--output-file", str(out))
    for message, arguments in {
        "go together": ("--input-file", str(prompts)),
        "line 2 has no text": both,
        "top_p = 3.0 is out of range": ("--prompt", "a", "--top-p", "3"),
        "--num-beams 0: at least 1": ("--prompt", "a", "--num-beams", "0"),
        "which draws nothing": ("--prompt", "a", "--num-beams", "2", "--seed", "1"),
        "choose one": ("--prompt", "a", "--draft", model, "--prompt-lookup"),
        "empty prompt": ("--prompt", ""),
        "answers go to .json or .jsonl": ("--input-file", str(good), "--output-file", str(tmp_path / "a.csv")),
        "prompt 2: the prompt has": ("--input-file", str(good), "--output-file", str(out)),
        "no such directory": ("--input-file", str(good), "--output-file", str(tmp_path / "no" / "a.json")),
    }.items():
        assert message in failure(model, *arguments), message
    out.write_text("")
    assert "is there already" in failure(model, "--input-file", str(good), "--output-file", str(out))
    out.unlink()
    out.with_name(out.name + ".partial").write_text('{"of": "other"}\n')
    assert "other prompts or settings" in failure(model, "--input-file", str(good), "--output-file", str(out))
