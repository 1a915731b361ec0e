"""`manifest.json` of a store: written with a checksum of itself, read only where all it says fits together.

Knows the file, not the documents: what a manifest describes is read by `shards.py` and compared with it by `verify.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moai_llm.runtime import MoaiError

FORMAT = 1
KINDS = ("text", "chat", "preference", "embedding")
BYTES = {"uint16": 2, "uint32": 4}  # of a token
DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def damaged(file: Path, what: str) -> MoaiError:
    """The error for a file of a store that is not what it was."""
    return MoaiError(f"{file} is damaged ({what}): prepare the data again")


def sealed(content: dict[str, Any], folder: Path) -> bytes:
    """The bytes of `manifest.json`, with checksums of the tokenizer's files in `folder` and one of itself."""
    files = sorted(path for path in (folder / "tokenizer").rglob("*") if path.is_file())
    described = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    content = {key: value for key, value in content.items() if value or key not in ("parts", "strategy")}
    content |= {"tokenizer_files": described, "digest": ""}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace('"digest": ""', f'"digest": "{digest}"').encode()


def read_manifest(file: Path) -> tuple[dict[str, Any], str]:
    """(content, sha256 of the file).

    Raises:
        MoaiError: no such file, not a manifest, of another format, or one that contradicts itself.
    """
    content, raw = parse_manifest(file)
    for problem in malformed(content) if any(malformed(content)) else inconsistent(content, raw):
        raise damaged(file, problem)
    return content, hashlib.sha256(raw).hexdigest()


def parse_manifest(file: Path) -> tuple[dict[str, Any], bytes]:
    """(content, bytes), of which nothing is known but that it is JSON of our format."""
    if not file.is_file():
        raise MoaiError(f"{file.parent} is not a prepared store (no manifest.json): make one with `moai data prepare`")
    raw = file.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(file, str(error)) from None
    if not isinstance(content, dict):
        raise damaged(file, "not an object of JSON")
    if content.get("format") != FORMAT:
        raise MoaiError(f"{file.parent}: store format {content.get('format')!r}, this version reads {FORMAT}")
    return content, raw


def malformed(content: dict[str, Any]) -> Iterator[str]:
    """What is missing in a manifest or is not of its type; without any of it `inconsistent` can be asked."""
    if content.get("kind") not in KINDS:
        yield f"kind is {content.get('kind')!r}, not one of {', '.join(KINDS)}"
    if content.get("dtype") not in BYTES:
        yield f"dtype is {content.get('dtype')!r}, not one of {', '.join(BYTES)}"
    if not isinstance(content.get("tokenizer"), str):
        yield "tokenizer is no fingerprint"
    for key, kind in (("text_bytes", int), ("sources", list), ("strategy", str), ("digest", str)):
        if key in content and not isinstance(content[key], kind):
            yield f"{key} is {content[key]!r}"
    for key in ("vocab_size", "tokens", "documents"):
        if not _is_count(content.get(key)):
            yield f"{key} is {content.get(key)!r}, not a number above 0"
    shards, parts = content.get("shards", []), content.get("parts", [])
    if not isinstance(shards, list) or not isinstance(parts, list):
        yield "shards and parts are no lists"
        return
    if bool(shards) == bool(parts):
        yield "a store has either shards or parts"
    for i, shard in enumerate(shards):
        yield from (f"shard {i}: {problem}" for problem in _malformed_shard(shard))
    for i, part in enumerate(parts):
        yield from (f"part {i}: {problem}" for problem in _malformed_part(part))
    files = content.get("tokenizer_files", {})
    if not isinstance(files, dict) or not all(_is_described(described) for described in files.values()):
        yield "tokenizer_files has no sizes and checksums"
    elif outside := [name for name in files if is_outside(name)]:
        yield f"manifest names a file outside the store: {outside[0]}"


def _malformed_shard(shard: Any) -> Iterator[str]:
    if not isinstance(shard, dict) or not isinstance(shard.get("files"), dict):
        yield "no files are described"
        return
    names = [shard.get("stem"), *shard["files"]]
    if outside := [name for name in names if not isinstance(name, str) or is_outside(name)]:
        yield f"manifest names a file outside the store: {outside[0]}"
    for key in ("tokens", "documents"):
        if not _is_count(shard.get(key)):
            yield f"{key} is {shard.get(key)!r}, not a number above 0"
    for name, described in shard["files"].items():
        if not _is_described(described):
            yield f"{name} has no size and checksum"


def _malformed_part(part: Any) -> Iterator[str]:
    if not isinstance(part, dict):
        yield "is no object"
        return
    if not isinstance(part.get("path"), str) or not part["path"] or "\0" in part["path"]:
        yield f"path is {part.get('path')!r}"
    weight = part.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
        yield f"weight is {weight!r}, not a share of the rows"
    if not isinstance(part.get("manifest"), str) or not DIGEST.fullmatch(part["manifest"]):
        yield "has no checksum of its manifest"
    for key in ("tokens", "documents"):
        if not _is_count(part.get(key)):
            yield f"{key} is {part.get(key)!r}, not a number above 0"


def inconsistent(content: dict[str, Any], raw: bytes) -> Iterator[str]:
    """What contradicts itself in a manifest that is not `malformed`."""
    if content["dtype"] == "uint16" and content["vocab_size"] > 2**16:
        yield f"{content['vocab_size']:,} token ids do not fit into uint16"
    suffixes = {"bin": BYTES[content["dtype"]], "idx.npy": 0, **({} if content["kind"] == "text" else {"mask.bin": 1})}
    members = content.get("shards") or content["parts"]
    for shard in content.get("shards", []):
        wanted = {f"{shard['stem']}.{suffix}": size for suffix, size in suffixes.items()}
        if set(wanted) != set(shard["files"]):
            yield f"{shard['stem']} has the files {', '.join(sorted(shard['files']))}, not {', '.join(sorted(wanted))}"
            continue
        for name, size in wanted.items():
            given = shard["files"][name]["bytes"]
            if size and given != size * shard["tokens"]:
                yield f"{name}: {given:,} bytes are not {shard['tokens']:,} tokens"
    for what, names in (("shard", [s["stem"] for s in content.get("shards", [])]),
                        ("part", [p["path"] for p in content.get("parts", [])]),
                        ("manifest", [p["manifest"] for p in content.get("parts", [])])):  # fmt: skip
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            yield f"the {what} {twice[0]} is there twice"
    for key in ("tokens", "documents"):
        if (total := sum(member[key] for member in members)) != content[key]:
            yield f"{key} is {content[key]:,}, but {total:,} in its {'shards' if content.get('shards') else 'parts'}"
    if content.get("parts") and not math.isclose(sum(part["weight"] for part in members), 1, abs_tol=1e-6):
        yield f"the weights sum to {sum(part['weight'] for part in members):g}, not to 1"
    given = content.get("digest", "")
    blank = raw.replace(f'"{given}"'.encode("utf-8", "replace"), b'""', 1)
    if given and hashlib.sha256(blank).hexdigest() != given:
        yield "its content does not match its own checksum"


def is_outside(name: str) -> bool:
    """Whether a name of a file in a store leaves the store, or is none."""
    return not name or "/../" in f"/{name}/" or name.startswith("/") or "\0" in name or "\\" in name or ":" in name


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_described(described: Any) -> bool:
    return (
        isinstance(described, dict)
        and _is_count(described.get("bytes"))
        and isinstance(described.get("sha256"), str)
        and bool(DIGEST.fullmatch(described["sha256"]))
    )
