"""Reading pages in tests: a parser that complains of what is not closed, and a real browser without a window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
FETCHING = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
FOREIGN = ("link", "iframe", "object", "embed", "base", "img")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


# how wide a page became, how many plots it has, how high their smallest letters are
MEASURE = """{wide: d.documentElement.scrollWidth, plots: d.querySelectorAll("svg").length,
    smallest: Math.min(...[...d.querySelectorAll("svg text")]
        .map(t => t.getBoundingClientRect().height).filter(height => height))}"""


class Page(HTMLParser):
    """Reads a page, sees to it that every element is closed where it should be, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.data = self.words = ""
        self._caption = self._cell = ""
        self.feed(text)
        self.close()
        if self.open:
            raise ValueError(f"never closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            raise ValueError(f"an attribute of {tag} is given twice")
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("td", "th", "caption"):
            self._cell = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing at {self.getpos()}")
        if tag == "caption":
            self._caption = self._cell
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append(self._cell)

    def handle_data(self, data: str) -> None:
        self._cell += data
        if self.open[-1:] == ["script"]:
            self.data += data
        elif self.open[-1:] != ["style"]:
            self.words += data


def outside(text: str) -> list[str]:
    """What a page would fetch, or run."""
    parsed = Page(text)
    found = []
    for tag, attributes in parsed.tags:
        found += [f"{tag} {name}={value}" for name, value in attributes.items() if name in FETCHING or name[:2] == "on"]
        if tag in FOREIGN or tag == "script" and attributes.get("type") != "application/json":
            found.append(tag)
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    styles += " ".join(str(attributes.get("style")) for _, attributes in parsed.tags)
    return found + re.findall(r"url\(|@import|https?:|expression\(", styles)


def screenshot(text: str, folder: Path, width: int, height: int = 2000) -> bytes:
    """The page as a PNG. Skips the test where there is no browser."""
    file, picture = folder / "page.html", folder / f"page-{width}.png"
    file.write_text(text, encoding="utf-8")
    _run(folder, f"--window-size={width},{height}", "--hide-scrollbars", f"--screenshot={picture}", file.as_uri())
    return picture.read_bytes()


def measured(text: str, folder: Path, width: int, script: str) -> dict[str, Any]:
    """What a script that only the test adds finds in a page of this width.

    Args:
        script: an expression over `d`, the document of the page.
    """
    frame, source = folder / "frame.html", html.escape(text, quote=True)
    measure = f"""<script>onload = () => {{ const d = document.getElementById("f").contentDocument;
        document.title = JSON.stringify({script}); }}</script>"""
    frame.write_text(
        f'<iframe id="f" width="{width}" height="800" style="border:0" srcdoc="{source}"></iframe>{measure}',
        encoding="utf-8",
    )
    output = _run(folder, "--virtual-time-budget=3000", "--dump-dom", frame.as_uri())
    (title,) = re.findall(r"<title>(\{.*?\})</title>", output)
    return dict(json.loads(html.unescape(title)))


def _run(folder: Path, *arguments: str) -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"{browser} does not start here: {done.stderr[-300:]}")
    return done.stdout
