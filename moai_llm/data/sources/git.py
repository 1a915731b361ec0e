"""Git repositories: the tracked files of a commit, or those that changed since another one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from moai_llm.data.sources.git_plumbing import Entry, Objects, ask, find_commit, list_changed, list_tree
from moai_llm.data.sources.languages import CODE, PROSE
from moai_llm.data.sources.licences import NAMES, licence_of_file, licence_of_text
from moai_llm.data.sources.records import Reading, Record, Skipped, Source, read_size, show_size
from moai_llm.runtime import MoaiError, did_you_mean

MAX_FILE = 1 << 20  # bytes; larger ones are data or generated
KEYS = ("ext", "license", "max", "since")
VENDORED = {
    "node_modules", "bower_components", "vendor", "vendors", "third_party", "third-party", "thirdparty", "3rdparty",
    "site-packages", "Pods", "Carthage", "dist", ".venv", "venv",
}  # fmt: skip
GENERATED_NAME = re.compile(r"(\.min\.\w+|_pb2(_grpc)?\.pyi?|\.pb\.\w+|\.g\.dart|[._]generated\.\w+)$")
GENERATED_TEXT = re.compile(
    r"@generated|this file (is|was) (auto-?|automatically )?generated|generated.*do not (edit|modify)|"
    r"do not (edit|modify).*generated",
    re.IGNORECASE | re.DOTALL,
)
LICENCE_NAME = re.compile(r"((un)?licen[cs]e|copying)([.-][\w.-]+)?", re.IGNORECASE)  # LICENSE-MIT, COPYING.LESSER
LFS = b"version https://git-lfs.github.com/spec/"
LONG_LINE = 10_000  # characters: a line that nobody wrote


class Repository(NamedTuple):
    """A repository at a commit, and which of its files are wanted."""

    path: str
    commit: str
    folder: str  # within the repository, "" for all of it
    extensions: tuple[str, ...]
    licences: tuple[str, ...]  # all when empty
    max_file: int  # bytes
    since: str | None

    @property
    def name(self) -> str:
        return f"git:{self.path}@{self.commit[:12]}"

    def entries(self) -> list[Entry]:
        """Files of the wanted extensions, and with `since` only those that differ from there."""
        entries = list_tree(self.path, self.commit, self.folder)
        if self.since:
            changed = list_changed(self.path, self.since, self.commit)
            entries = [entry for entry in entries if entry.path in changed]
        return [entry for entry in entries if _suffix(entry.path) in self.extensions]


def git_source(given: str) -> Source:
    """`git:PATH@REVISION?ext=py,md&license=mit&max=1MB&since=COMMIT`, or `git+file://PATH...`; all but the path is
    optional.

    Raises:
        MoaiError: no repository, an unknown revision, option or licence, nothing tracked that is asked for.
    """
    repository = _open(given)
    entries = repository.entries()
    if not entries and not repository.since:  # that nothing changed is no mistake
        tracked = list_tree(repository.path, repository.commit, repository.folder)
        kinds = Counter(_suffix(entry.path) or "without a suffix" for entry in tracked)
        have = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        some = ", ".join(repository.extensions[:5]) + (", ..." if len(repository.extensions) > 5 else "")
        raise MoaiError(f"{given}: no tracked file ends in {some}; there are {have}. ?ext= names others")
    size = sum(entry.size for entry in entries if entry.size <= repository.max_file)
    name = repository.name
    return Source(name, size, partial(_read, repository), origin=name, version=str(repository))


def _open(given: str) -> Repository:
    """A repository from how it is written."""
    rest, options = given.removeprefix("git:"), {}
    if given.startswith("git+"):
        url = urlsplit(given.removeprefix("git+"))
        if url.scheme != "file":
            raise MoaiError(f"{given}: clone it first (git clone {given[4:]} FOLDER) and read git:FOLDER")
        rest = unquote(url.path) + (f"?{url.query}" if url.query else "")
    if not Path(rest).exists() and "?" in rest:
        rest, _, query = rest.rpartition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
    if wrong := next((key for key in options if key not in KEYS), None):
        raise MoaiError(f"{given}: no option {wrong!r}{did_you_mean(wrong, KEYS)}; there are {', '.join(KEYS)}")
    path, revision = rest, "HEAD"
    if not Path(rest).exists() and "@" in rest:
        path, _, revision = rest.rpartition("@")
    folder = Path(path or ".").expanduser()
    if not folder.is_dir():
        raise MoaiError(f"{given}: there is no folder {folder}")
    try:
        prefix = ask(str(folder), "rev-parse", "--show-prefix").decode().rstrip("\n")
    except MoaiError as error:
        raise MoaiError(f"{folder} cannot be read as a git repository: {error}") from None
    licences = _names(options.get("license", ""))
    if unknown := next((name for name in licences if name not in NAMES), None):
        raise MoaiError(f"{given}: no licence {unknown!r}{did_you_mean(unknown, NAMES)}; known are {', '.join(NAMES)}")
    since = options.get("since")
    return Repository(
        str(folder),
        _commit(str(folder), revision, given),
        prefix,
        tuple("." + name.lstrip(".") for name in _names(options.get("ext", ""))) or (*CODE, *PROSE),
        licences,
        read_size(options["max"]) if "max" in options else MAX_FILE,
        _commit(str(folder), since, given) if since else None,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def _commit(path: str, revision: str, given: str) -> str:
    found = find_commit(path, revision)
    if found is None:
        why = ": it has no commit yet" if revision == "HEAD" else " (a shallow clone lacks old ones)"
        raise MoaiError(f"{given}: there is no commit {revision!r} in {path}{why}")
    return found


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _read(repository: Repository, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    name, entries = repository.name, repository.entries()
    if not entries:
        return
    with Objects(repository.path) as objects:
        licences = _licences(repository, objects)
        for entry in entries:
            text, why = "", _why_not(entry, repository)
            if not why:
                text, why = _text(objects.read(entry.object))
            if reading.progress and entry.size <= repository.max_file:
                reading.progress(entry.size)
            licence = "" if why else licence_of_file(text) or _nearest(licences, entry.path)
            if not why and repository.licences and licence not in repository.licences:
                why = f"licence {licence}"
            if why:
                skipped.leave_out(name, why)
                continue
            suffix = _suffix(entry.path)
            columns = {
                "text": text,
                "path": entry.path,
                "language": CODE.get(suffix) or PROSE.get(suffix) or suffix.lstrip("."),
                "license": licence,
                "repository": repository.path,
                "commit": repository.commit,
            }
            yield Record(columns, f"{name}:{entry.path}", name)


def _why_not(entry: Entry, repository: Repository) -> str | None:
    """Why a file is left out, as far as that is known without its content."""
    path = PurePosixPath(entry.path)
    if entry.mode == "120000":
        return "a symbolic link"
    if entry.mode == "160000":
        return "a submodule"
    if VENDORED & set(path.parts[:-1]):
        return "vendored"
    if GENERATED_NAME.search(path.name):
        return "generated"
    return f"larger than {show_size(repository.max_file)}" if entry.size > repository.max_file else None


def _text(data: bytes) -> tuple[str, str | None]:
    """(text, why it is left out)."""
    if data.startswith(LFS):
        return "", "a pointer to Git LFS"
    if b"\0" in data:
        return "", "binary"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if GENERATED_TEXT.search("\n".join(text[:1000].splitlines()[:5])):
        return "", "generated"
    return ("", "minified") if max(map(len, text.splitlines()), default=0) > LONG_LINE else (text, None)


def _licences(repository: Repository, objects: Objects) -> dict[str, str]:
    """Folder -> the licence that a file in it holds, in the whole repository at the commit."""
    found: dict[str, str] = {}
    for entry in list_tree(repository.path, repository.commit):
        path = PurePosixPath(entry.path)
        named = LICENCE_NAME.fullmatch(path.name) and _suffix(entry.path) not in CODE
        if named and entry.mode.startswith("100") and entry.size < 1 << 18:
            text = objects.read(entry.object).decode("utf-8", "replace")
            found.setdefault(str(path.parent), licence_of_text(text))
    return found


def _nearest(licences: dict[str, str], path: str) -> str:
    """The licence of the closest folder above a file that has one."""
    above = map(str, PurePosixPath(path).parents)
    return next((licences[folder] for folder in above if folder in licences), "unknown")
