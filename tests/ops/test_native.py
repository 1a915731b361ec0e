"""Building a C++ kernel for this CPU: what is kept, what is refused, and that a failure is a reason and not a crash."""

import ctypes
import logging
import os
import subprocess

import pytest

from moai_llm.ops import native
from moai_llm.ops.dispatch import Unavailable

SOURCE = os.path.join(os.path.dirname(native.__file__), "selective_scan.cpp")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def tiny(tmp_path):
    """A source that builds at once, beside its own native.h."""
    (tmp_path / "native.h").write_text('extern "C" void moai_use_team(void*) {}\n')
    source = tmp_path / "tiny_kernel.cpp"
    source.write_text('#include "native.h"\nextern "C" int answer() { return 42; }\n')
    return source


@pytest.fixture(autouse=True)
def compiler():
    try:
        native._compiler()
    except Unavailable as error:
        pytest.skip(str(error))


def test_built_once_then_taken_from_the_cache(tiny, cache, caplog):
    caplog.set_level(logging.DEBUG, "moai_llm")
    assert native._load(str(tiny)).answer() == 42
    (first,) = cache.iterdir()
    time = first.stat().st_mtime_ns
    assert native._load(str(tiny)).answer() == 42
    assert list(cache.iterdir()) == [first] and first.stat().st_mtime_ns == time
    built, taken = caplog.messages
    assert built.startswith("built the native tiny kernel for this CPU in ") and built.endswith(str(first))
    assert taken == f"native tiny kernel: {first}"
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG"]  # said once, when it takes time
    assert cache.stat().st_mode & 0o077 == 0


def test_another_source_header_compiler_or_cpu_is_another_library(tiny, cache, monkeypatch):
    native._load(str(tiny))
    assert len(list(cache.iterdir())) == 1
    tiny.write_text(tiny.read_text() + "// changed\n")
    native._load(str(tiny))
    header = tiny.with_name("native.h")
    header.write_text(header.read_text() + "// changed\n")
    native._load(str(tiny))
    monkeypatch.setattr(native, "_cpu", lambda: "another")
    native._load(str(tiny))
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-DANOTHER"])
    native._load(str(tiny))
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_a_damaged_library_is_built_again(tiny, cache, damage):
    native._load(str(tiny))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    # written as a new file: the one in use is mapped into this process
    path.unlink()
    path.write_bytes({"garbage": os.urandom(len(whole)), "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    assert native._load(str(tiny)).answer() == 42
    assert [p.stat().st_size for p in cache.iterdir()] == [len(whole)]


def test_a_library_that_does_not_load(tiny, cache):
    cache.mkdir(parents=True, mode=0o700)
    bad = cache / "bad.so"
    bad.write_bytes(b"garbage")
    with pytest.raises(Unavailable, match="does not load"):
        native._open(str(bad))


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("/bin/false", "failed with code 1"),
        ("/no/such/compiler", "is not there"),
        ("/bin/true", "no cache|does not load"),
    ],
)
def test_a_broken_compiler_is_a_reason(tiny, cache, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(Unavailable, match=reason):
        native._load(str(tiny))
    assert not list(cache.glob("*.tmp"))


def test_no_compiler_at_all(tiny, cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="no C"):
        native._load(str(tiny))


def test_a_compile_error_says_which(tiny, cache):
    tiny.write_text('#include "native.h"\nint f() { return undeclared; }\n')
    with pytest.raises(Unavailable, match="undeclared"):
        native._load(str(tiny))
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_made(tiny, cache):
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(Unavailable, match="no cache"):
        native._load(str(tiny))


def test_a_cache_that_others_can_write(tiny, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(Unavailable, match="written by others"):
        native._load(str(tiny))
    cache.chmod(0o755)
    assert native._load(str(tiny)).answer() == 42


def test_a_failure_is_remembered(monkeypatch):
    calls = []

    def fail(source):
        calls.append(source)
        raise Unavailable("no")

    monkeypatch.setattr(native, "_load", fail)
    for _ in range(2):
        with pytest.raises(Unavailable):
            native.load("no_such_kernel.cpp")
    assert len(calls) == 1
    del native._loaded["no_such_kernel.cpp"]


def test_the_openmp_runtime_of_torch_is_found():
    address = native._openmp_parallel()
    if address is None:
        pytest.skip("this torch has no OpenMP")
    assert ctypes.CFUNCTYPE(None)(address)


def test_the_kernel_keeps_to_its_memory(tmp_path):
    """Odd sizes with arrays of the exact length, under the address and undefined behaviour sanitizers. Whatever is in
    fresh memory (NaN, for bytes of 255), the results are the same.
    """
    folder = os.path.dirname(SOURCE)
    driver = os.path.join(os.path.dirname(__file__), "selective_scan_driver.cpp")
    binary = str(tmp_path / "driver")
    command = [*native._compiler(), "-std=c++17", "-O1", "-w", f"-I{folder}", driver, "-o", binary, "-lpthread"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run([*command, *sanitizers, native.TARGETS[0]], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    outputs = set()
    for byte in (0, 255):
        environment = {**os.environ, "ASAN_OPTIONS": f"max_malloc_fill_size=1000000000:malloc_fill_byte={byte}"}
        done = subprocess.run([binary], capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.add(done.stdout)
    (output,) = outputs
    assert output.startswith("576 sizes, checksum ") and "nan" not in output
