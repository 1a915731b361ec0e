"""The chat page in a real browser: conversations, Markdown, what a hostile model may not do, and how it looks."""

from __future__ import annotations

import json
import random
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moai_llm.inference.engine import Event
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.server import service as services
from moai_llm.inference.server.app import FILES
from moai_llm.inference.server.sse import DONE, event
from moai_llm.inference.text_stream import TextStream
from tests.browser import Page
from tests.cdp import Tab, browser
from tests.inference.server.conftest import Served, serving

SAMPLE = """Compound interest is **interest on interest**. With a rate *r* and *n* years:

```python
def compound(amount: float, rate: float, years: int) -> float:
    return amount * (1 + rate) ** years
```

| years | at 3 % | at 5 % |
|:--|--:|--:|
| 10 | 1,344 | 1,629 |
| 30 | 2,427 | 4,322 |

1. The first year pays `amount * rate`.
2. The second pays a little more:
   - on the amount,
   - and on the first year's interest.

> 복리는 이자에 이자가 붙는 방식이에요. 元金と利息。

See [the table](https://example.com/table) and ~~nothing~~ else."""

EVIL = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt:window.hacked=1)",
    "[x]( javascript:hacked=1 )",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "![x](https://evil.test/p.png)",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "`<b onclick=hacked=1>`",
    "```<svg onload=hacked=1>\n</code></pre><script>hacked=1</script>\n```",
    "| <img src=x onerror=hacked=1> | b |\n|--|--|\n| <script>hacked=1</script> | [y](vbscript:x) |",
    "# <style>*{display:none}</style>",
    "<a href='javascript:hacked=1'>x</a>",
    '[x](https://a.test/" onmouseover="hacked=1)',
    'https://a.test/"onclick=hacked=1',
    "[![x](javascript:hacked=1)](javascript:hacked=1)",
    "> <object data=x>\n> - <embed src=y>",
    "&lt;script&gt; &#60;b&#62;",
    "<form action=//evil.test><input autofocus onfocus=hacked=1>",
    "\u202e<script>\u0000hacked=1</script>",
]


class Scripted:
    """An engine that says what a test wants, a token a step; what it was asked is kept."""

    def __init__(self, text_model: TextModel, **_: Any) -> None:
        self.tokenizer = text_model.tokenizer
        self.says: deque[str] = deque()
        self.asked: list[tuple[str, Sampling]] = []
        self.pause = 0.0
        self.live: list[Any] = []
        self.counters = SimpleNamespace(cancelled=0)
        self.waiting = 0

    @property
    def busy(self) -> bool:
        return bool(self.live)

    @property
    def running(self) -> int:
        return len(self.live)

    def submit(self, prompt: list[int], sampling: Sampling) -> Any:
        self.asked.append((self.tokenizer.decode(prompt), sampling))
        ids = deque(self.tokenizer.encode(self.says.popleft() if self.says else "Yes."))
        self.live.append(
            SimpleNamespace(ids=ids, text=TextStream(self.tokenizer), reused=0, sampling=sampling, count=0)
        )
        return self.live[-1]

    def cancel(self, request: Any) -> None:
        if request in self.live:
            self.live.remove(request)
            self.counters.cancelled += 1

    def step(self) -> list[Event]:
        time.sleep(self.pause)
        events = []
        for request in list(self.live):
            if not request.ids:
                self.live.remove(request)
                events.append(Event(request, None, request.text.end(), finished="stop"))
                continue
            token = request.ids.popleft()
            request.count += 1
            full = request.count == request.sampling.max_new_tokens
            events.append(Event(request, token, request.text.push(token), finished="length" if full else None))
            if full:
                self.live.remove(request)
        return events


@pytest.fixture(scope="module")
def scripted(text_model: TextModel) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "Engine", Scripted)
        with serving(text_model, name="moai-chat", max_new_tokens=500) as server:
            server.service.context = 4096
            yield server


@pytest.fixture(scope="module")
def shared_tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def engine(scripted: Served) -> Scripted:
    made: Any = scripted.service.worker._engine
    made.says.clear()
    made.asked.clear()
    made.pause = 0.0
    return made


@pytest.fixture
def tab(shared_tab: Tab, scripted: Served, engine: Scripted) -> Tab:
    """The page as it is first opened, and ready."""
    shared_tab.open(f"{scripted.url}/health")
    shared_tab.run("localStorage.clear(); sessionStorage.clear()")
    shared_tab.said.clear()
    shared_tab.requests.clear()
    opened(shared_tab, scripted.url)
    return shared_tab


def opened(tab: Tab, url: str, **how: Any) -> None:
    tab.open(url, **how)
    tab.wait("document.querySelector('.state.on') !== null")


def say(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('text').focus()")
    tab.type(text)
    tab.press("Enter", 13, text="\r")


def answered(tab: Tab, count: int) -> None:
    tab.wait(f"document.querySelectorAll('.turn.assistant').length === {count} && !document.querySelector('.waiting')")


LAST = "[...document.querySelectorAll('.turn.assistant')].at(-1)"


def last_text(tab: Tab) -> str:
    return str(tab.run(f"{LAST}.querySelector('.said').innerText"))


# ---------------------------------------------------------------- what it is made of


def test_nothing_comes_from_elsewhere_and_no_text_becomes_html() -> None:
    sources = {name: b"".join(file.read_bytes() for file in files).decode() for name, (files, _) in FILES.items()}
    page = Page(sources[""])
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(str(address)[0] in "/#" and str(address)[:2] != "//" for address in addresses)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert len(page.ids) == len(set(page.ids))
    scripts = "".join(text for name, text in sources.items() if name.endswith(".js"))
    dangerous = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|DOMParser|srcdoc"
    assert not re.search(dangerous, scripts)
    named = set(re.findall(r"\bat\(\"([\w-]+)\"\)", scripts))
    assert len(named) > 20 and named <= set(page.ids)
    assert not re.search(r"url\(|@import|https?:", sources["chat.css"])
    # the name of SVG, which nothing fetches
    assert set(re.findall(r"https?://[\w.]+", scripts)) <= {"http://www.w3.org"}


# ---------------------------------------------------------------- a conversation


def test_a_conversation(tab: Tab, scripted: Served, engine: Scripted, tmp_path: Path) -> None:
    engine.says += [SAMPLE, "No."]
    say(tab, "복리가 뭐예요?")
    answered(tab, 1)
    shown = f"{LAST}.querySelector('.said')"
    counts = {"strong": 1, "em": 2, "figure.code code": 1, "table tbody tr": 2, "ol > li": 2, "ol ul > li": 2,
              "blockquote": 1, "a[href='https://example.com/table']": 1, "del": 1}  # fmt: skip
    assert {what: tab.run(f"{shown}.querySelectorAll({json.dumps(what)}).length") for what in counts} == counts
    assert "amount * (1 + rate) ** years" in tab.run(f"{shown}.querySelector('pre').textContent")
    assert re.match(r"\d+ tokens · \d+ tokens/s", tab.run(f"{LAST}.querySelector('.facts-of').textContent"))
    tab.type("first line")
    tab.press("Enter", 13, text="\r", shift=True)
    tab.type("second line")
    tab.press("Enter", 13, text="\r")
    answered(tab, 2)
    assert last_text(tab) == "No." and "first line\nsecond line" in engine.asked[1][0]
    assert "Compound interest is" in engine.asked[1][0]  # the whole conversation was sent
    assert engine.asked[0][1].temperature == 0.7 and engine.asked[0][1].max_new_tokens == 500
    for width, dark in ((1200, False), (390, False), (390, True), (1200, True)):
        opened(tab, scripted.url, width=width, height=844 if width < 600 else 860, dark=dark, mobile=width < 600)
        assert tab.run("document.querySelectorAll('.turn').length") == 4  # it was kept in the tab
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run("document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth")
        light = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (light < 60) is dark
        assert tab.run("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight")
        tab.run("document.getElementById('scroll').scrollTop = 0")
        picture = tab.picture(tmp_path / f"chat-{width}{'-dark' * dark}.png")
        assert picture.startswith(b"\x89PNG") and len(picture) > 8_000
    assert not tab.said
    assert {re.sub(r"\d+", "", url.split("/")[2]) for url in tab.requests} == {"...:"}  # this server and no other


def test_the_first_look(tab: Tab, tmp_path: Path) -> None:
    assert tab.run("document.title") == "moai-chat" and "256 tokens" in tab.run("document.body.innerText")
    assert tab.run("document.getElementById('send').disabled")
    tab.run("document.querySelector('#starters button[lang=ko]').click()")
    answered(tab, 1)
    assert tab.run("document.querySelector('.turn.user').innerText") == "복리가 뭐예요?"
    assert tab.run("document.getElementById('welcome').hidden")
    tab.run("document.getElementById('new').click()")
    assert not tab.run("document.getElementById('welcome').hidden || document.querySelector('.turn') !== null")


def test_stop_frees_the_place(tab: Tab, scripted: Served, engine: Scripted) -> None:
    for stop in ("document.getElementById('send').click()", "escape"):
        before = engine.counters.cancelled
        engine.says.append("word " * 400)
        engine.pause = 0.02
        say(tab, "count")
        tab.wait(f"document.querySelector('.waiting') && {LAST}.innerText.length > 10")
        assert tab.run("document.getElementById('send').title") == "Stop"
        tab.press("Escape", 27) if stop == "escape" else tab.run(stop)
        tab.wait("!document.querySelector('.waiting')")
        scripted.idle()
        assert engine.counters.cancelled == before + 1
        assert "stopped" in tab.run(f"{LAST}.innerText") and len(last_text(tab)) < 2000
        assert tab.run("document.getElementById('send').title") == "Send"
    assert not tab.said


def test_again_and_copy(tab: Tab, engine: Scripted) -> None:
    engine.says += ["One.", "Two.\n\n```\ncode\n```"]
    say(tab, "number?")
    answered(tab, 1)
    tab.run(f"{LAST}.querySelector('[title=\"Answer again\"]').click()")
    tab.wait(f"{LAST}.innerText.includes('Two')")
    answered(tab, 1)
    assert engine.asked[0][0] == engine.asked[1][0]
    tab.run("""Object.defineProperty(navigator, 'clipboard',
        {value: {writeText: async (text) => { window.copied = text; }}, configurable: true})""")
    tab.run(f"{LAST}.querySelector('.copy-code').click()")
    tab.wait("window.copied === 'code'")
    tab.run(f"{LAST}.querySelector('[title=\"Copy the answer\"]').click()")
    tab.wait("window.copied.startsWith('Two.')")


def test_enter_ends_a_composition_first(tab: Tab, engine: Scripted) -> None:
    """Enter chooses what an input method of Korean, Japanese or Chinese offers; it does not send half a word."""
    tab.run("document.getElementById('text').focus()")
    tab.type("이자")
    tab.run("""document.getElementById('text').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))""")
    assert tab.run("document.querySelectorAll('.turn').length") == 0
    tab.run("""document.getElementById('text').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))""")
    answered(tab, 1)  # control


def test_settings_are_sent_and_kept(tab: Tab, scripted: Served, engine: Scripted, tmp_path: Path) -> None:
    tab.run("document.getElementById('open-settings').click()")
    for name, value in {"system": "Be brief.", "temperature": "0", "top-p": "0.5", "tokens": "3"}.items():
        tab.run(f"""(() => {{ const field = document.getElementById('set-{name}'); field.value = {json.dumps(value)};
            field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()""")
    tab.picture(tmp_path / "settings.png")
    assert tab.run("document.getElementById('show-temperature').textContent") == "0.00"
    tab.run("document.getElementById('settings').close()")
    opened(tab, scripted.url)
    engine.says.append("a b c d e f g")
    say(tab, "hello")
    answered(tab, 1)
    text, sampling = engine.asked[0]
    assert "Be brief." in text and (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0, 0.5, 3)
    assert "cut at the limit" in tab.run(f"{LAST}.innerText")


def test_a_conversation_that_is_too_long_loses_its_beginning(tab: Tab, scripted: Served, engine: Scripted) -> None:
    scripted.service.context = 300
    try:
        for i in range(4):
            engine.says.append("interest " * 40)
            say(tab, f"question {i}")
            answered(tab, i + 1)
    finally:
        scripted.service.context = 4096
    assert "left out, to fit the model's context" in tab.run(f"{LAST}.innerText")
    assert "question 0" not in engine.asked[-1][0] and "question 3" in engine.asked[-1][0]


def test_errors_are_shown_as_the_server_words_them(tab: Tab, scripted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted.service, "closing", True)
    say(tab, "hello")
    answered(tab, 1)
    assert tab.run(f"{LAST}.querySelector('[role=alert]').textContent") == "the server is shutting down"
    monkeypatch.setattr(scripted.service, "closing", False)
    tab.run(f"{LAST}.querySelector('[title=\"Answer again\"]').click()")
    tab.wait(f"{LAST}.innerText.includes('Yes.')")


def test_a_key_is_asked_for_and_stays_in_the_tab(shared_tab: Tab, text_model: TextModel) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "Engine", Scripted)
        with serving(text_model, api_key="secret") as server:
            shared_tab.open(server.url)
            shared_tab.wait("document.getElementById('settings').open")
            assert "asks for an API key" in shared_tab.run("document.getElementById('settings-title').textContent")
            shared_tab.type("secret")  # the field has the focus
            shared_tab.run("document.getElementById('settings').close()")
            shared_tab.wait("document.querySelector('.state.on') !== null")
            say(shared_tab, "hello")
            answered(shared_tab, 1)
            assert last_text(shared_tab) == "Yes."
            assert "secret" in shared_tab.run("JSON.stringify(sessionStorage)")
            assert "secret" not in shared_tab.run("JSON.stringify(localStorage)")


def test_a_base_model_goes_on_with_a_text(shared_tab: Tab, text_model: TextModel) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "Engine", Scripted)
        patch.setattr(services, "can_chat", lambda tokenizer: False)
        with serving(text_model) as server:
            opened(shared_tab, server.url)
            assert "continues what you write" in shared_tab.run("document.body.innerText")
            engine: Any = server.service.worker._engine
            engine.says.append(" was a time.")
            say(shared_tab, "Once upon")
            answered(shared_tab, 1)
            assert engine.asked[0][0] == "Once upon" and last_text(shared_tab) == "was a time."


# ---------------------------------------------------------------- a hostile model


def test_no_text_of_a_model_runs_or_loads_anything(tab: Tab, engine: Scripted) -> None:
    engine.says += ["\n\n".join(EVIL), *EVIL[:2]]
    say(tab, "attack")
    answered(tab, 1)
    say(tab, EVIL[1])
    answered(tab, 2)
    bad = """[...document.querySelectorAll('#log *')].filter((e) =>
        /^(SCRIPT|IFRAME|IMG|OBJECT|EMBED|STYLE|LINK|FORM|INPUT|BASE|META|TEXTAREA)$/i.test(e.nodeName)
        || [...e.attributes].some((a) => a.name.startsWith('on') || a.name === 'style'
                                         || /^\\s*(javascript|data|vbscript):/i.test(a.value))).length"""
    assert tab.run(bad) == 0
    links = tab.run("[...document.querySelectorAll('#log a')].map((a) => [a.protocol, a.rel, a.target])")
    assert all(link == ["https:", "noopener noreferrer nofollow", "_blank"] for link in links)
    time.sleep(0.1)
    assert tab.run("window.hacked") is None and not tab.said
    assert not [url for url in tab.requests if "evil" in url or "a.test" in url]
    assert "<script>window.hacked = 1</script>" in tab.run("document.getElementById('log').innerText")


def test_control_the_policy_stops_what_the_page_would_let_through(tab: Tab) -> None:
    with pytest.raises(AssertionError, match="TrustedHTML"):
        tab.run("document.body.insertAdjacentHTML('beforeend', '<b>x</b>')")
    with pytest.raises(AssertionError, match="TrustedScript"):
        tab.run("document.body.setAttribute('onclick', 'window.hacked = 1')")
    assert tab.run("fetch('https://example.com').then(() => 'through', () => 'stopped')") == "stopped"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a *b* **c** _d_", "<p>a <em>b</em> <strong>c</strong> <em>d</em></p>"),
        ("__e__ ~~f~~", "<p><strong>e</strong> <del>f</del></p>"),
        ("snake_case_name 2*3*4 a * b", "<p>snake_case_name 2<em>3</em>4 a * b</p>"),
        ("**한국어**를 **日本語**で", "<p><strong>한국어</strong>를 <strong>日本語</strong>で</p>"),
        ("`a*b*` ``x`y``", "<p><code>a*b*</code> <code>x`y</code></p>"), ("\\*a\\* \\", "<p>*a* \\</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"), ("# A\n## B #", "<h2>A</h2><h3>B</h3>"),
        ("- a\n- b\n  - c\n\ntext", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>text</p>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'), ("---", "<hr>"), ("**open", "<p>**open</p>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("<b>x</b> &amp;", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"), ("[a](mailto:x@y.z", "<p>[a](mailto:x@y.z</p>"),
        ("(https://a.b/c_d_e).",
         '<p>(<a href="https://a.b/c_d_e" target="_blank" rel="noopener noreferrer nofollow">https://a.b/c_d_e</a>).</p>'),
        ("", ""), ("a | b\nnot a table", "<p>a | b<br>not a table</p>"),
    ],
)  # fmt: skip
def test_markdown(tab: Tab, text: str, html: str) -> None:
    script = """import('/markdown.js').then(({show}) => { const into = document.createElement('div');
        show(into, TEXT); return into.innerHTML; })"""
    assert tab.run(script.replace("TEXT", json.dumps(text))) == html


def test_markdown_that_grows_is_the_markdown_of_the_whole(tab: Tab) -> None:
    """Rendering each beginning in turn, over the last one, ends in what rendering once gives; and nothing is slow."""
    script = """import('/markdown.js').then(({show}) => { const grown = document.createElement('div');
        const text = TEXT; for (let i = 0; i <= text.length; i += 7) show(grown, text.slice(0, i));
        show(grown, text); const once = document.createElement('div'); show(once, text);
        const began = performance.now();
        for (const evil of ['*'.repeat(9000), '[('.repeat(5000), '> '.repeat(5000), '`'.repeat(9000), '- '.repeat(5000),
                            '*a '.repeat(3000), '|-'.repeat(5000) + '\\n' + '|-'.repeat(5000)])
          show(document.createElement('div'), evil);
        return [grown.innerHTML === once.innerHTML, performance.now() - began, once.children.length]; })"""
    same, milliseconds, blocks = tab.run(script.replace("TEXT", json.dumps(SAMPLE)))
    assert same and blocks == 6 and milliseconds < 3000


def test_the_page_reads_events_wherever_they_are_cut(tab: Tab) -> None:
    texts = ["이자", "는 😀", "\n\ndata: x", "", "\u2028끝\r\n"]
    stream = b"".join([b": still here\n\n", *(event({"t": text}) for text in texts), DONE])
    rng = random.Random(0)
    cuts = [*([k] for k in range(len(stream))), *(sorted(rng.choices(range(len(stream)), k=50)) for _ in range(100))]
    script = """import('/api.js').then(({EventReader}) => { const bytes = new Uint8Array(BYTES); const all = new Set();
        for (const cut of CUTS) {
          const reader = new EventReader(), found = [], places = [0, ...cut, bytes.length];
          for (let i = 0; i + 1 < places.length; i++) found.push(...reader.push(bytes.slice(places[i], places[i + 1])));
          all.add(JSON.stringify(found)); }
        return [...all]; })"""
    (only,) = tab.run(script.replace("BYTES", json.dumps(list(stream))).replace("CUTS", json.dumps(cuts)))
    found = json.loads(only)
    assert found[-1] == "[DONE]" and [json.loads(data)["t"] for data in found[:-1]] == texts
