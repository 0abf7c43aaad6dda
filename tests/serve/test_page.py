"""The page: what a browser may do with it, what messages cannot do to it, and a conversation in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from importlib.util import find_spec
from itertools import count
from typing import Any

import pytest

from loopserve import Engine, load_stack
from loopserve.serve.page import page
from tests.serve.conftest import FACT, QUESTION, Running, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None or find_spec("playwright") is None,
    reason="needs playwright (pip install playwright) and a chromium on the PATH (apt-get install chromium)",
)
KEY = "a-key-of-the-tests"
HOSTILE = (
    "<img src=x onerror=\"document.title='gone'\"> <script>document.title='gone'</script>\n\n"
    "[run](javascript:document.title='gone') [go](https://example.org/a) ![seen](https://example.org/p.png)\n\n"
    "**bold** and *leaning* `<b>code</b>`\n\n- one\n  - two\n- three\n\n```html\n<script>1</script>\n```\n\n# Heading"
)


def get(server: Running, path: str = "/", **headers: str) -> tuple[HTTPResponse, str]:
    """The response to a GET, and its body."""
    connection = HTTPConnection("127.0.0.1", server.port)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


def inlined(name: str) -> str:
    found = re.findall(rf"<{name}[^>]*>(.*?)</{name}>", page().html, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_page_is_served_without_a_key_and_nothing_else_is(serve: Callable[..., Running]) -> None:
    server = serve(api_keys=(KEY,))
    found, text = get(server)
    assert found.status == 200 and text == page().html and KEY not in text
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert found.headers["x-content-type-options"] == "nosniff" and found.headers["referrer-policy"] == "no-referrer"
    for path in ("/v1/models", "/v1/sessions", "//", "/index.html", "/static/page.js"):
        assert get(server, path)[0].status == 401


def test_the_page_is_not_shown_under_a_name_of_another_machine(server: Running) -> None:
    assert get(server, Host="evil.example")[0].status == 403


def test_only_its_own_script_and_style_may_run() -> None:
    rules = dict(each.split(" ", 1) for each in page().content_security_policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'" and rules["img-src"] == "data:"
    for name, rule in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(inlined(name).encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_the_page_names_no_other_address() -> None:
    html = page().html
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", html) == ["data:,", "#entry"]
    assert "url(" not in html and "@import" not in html and "import(" not in html
    assert set(re.findall(r"https?://[a-z0-9.]+", html)) == set()


def test_text_never_becomes_markup() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\b|new Function"
    assert re.findall(forbidden, inlined("script")) == []
    assert re.findall(r"\son[a-z]+=|style=\"", page().html.replace(inlined("script"), "")) == []


def ask(server: Running, messages: list[Any], **own: Any) -> Any:
    return server.client().chat.completions.create(
        model="demo", messages=messages, temperature=0, extra_body={"loopserve": own} if own else None
    )


def test_the_attention_map_is_there_only_where_it_is_asked_for(server: Running) -> None:
    first = ask(server, [FACT])
    assert "attention_map" not in first.loopserve
    said = {"role": "assistant", "content": first.choices[0].message.content}
    second = ask(server, [FACT, said, QUESTION], attention_map=True)
    found = second.loopserve["attention_map"]
    buckets = found["buckets"]
    assert 0 < len(found["rows"]) <= found["steps"] == second.usage.completion_tokens - 1
    assert {len(row) for row in [found["percent"], *found["rows"]]} == {len(buckets)} and len(buckets) <= 64
    assert all(0 <= share <= 100 for share in found["percent"])
    assert [each["end"] for each in buckets[:-1]] == [each["start"] for each in buckets[1:]]
    assert buckets[0]["start"] == 0 and buckets[-1]["start"] == second.usage.prompt_tokens
    assert sorted({each["turn"] for each in buckets}) == [0, 1]
    assert "lisbon" in " ".join(each["text"] for each in buckets if each["turn"] == 0)
    session = json.loads(get(server, f"/v1/sessions/{second.loopserve['session_id']}")[1])
    assert session["turns"][-1]["figures"]["attention_map"] == found
    assert "attention_map" not in session["turns"][0]["figures"]


def test_a_stream_carries_each_steps_shares(server: Running) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="demo",
            messages=[FACT],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"loopserve": {"attention_map": True}},
        )
    )
    shown = [each.loopserve["attention"] for each in chunks if each.choices and hasattr(each, "loopserve")]
    whole = chunks[-1].loopserve["attention_map"]
    assert len(shown) == whole["steps"] > 0
    assert shown[0]["buckets"] == whole["buckets"] and all("buckets" not in each for each in shown[1:])
    assert [each["row"] for each in shown] == whole["rows"] or whole["steps_per_row"] > 1


def test_no_session_goes_on_counting(server: Running) -> None:
    ask(server, [FACT], attention_map=True)
    assert [each.attention_map for each in server.conversations.engine.token_engine.sessions] == [None]


def test_sessions_are_listed_with_title_and_turns(server: Running) -> None:
    first = ask(server, [FACT])
    ask(server, [FACT, {"role": "assistant", "content": first.choices[0].message.content}, QUESTION])
    (found,) = json.loads(get(server, "/v1/sessions")[1])["data"]
    assert found["title"] == FACT["content"] and found["turns"] == 2


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Tab:
    """A tab of the browser with the page of a server, and what a person does there."""

    def __init__(self, browser: Any, server: Running, *, key: str | None = None, **context: Any) -> None:
        self._context = browser.new_context(viewport={"width": 1280, "height": 800}, **context)
        self.page = self._context.new_page()
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.addresses: set[str] = set()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console", lambda entry: self.faults.append(entry.text) if "Content Security" in entry.text else None
        )
        self.page.on("request", lambda request: self.addresses.add(request.url.split("/")[2]))
        self.page.goto(server.url)
        if key is not None:
            self.page.get_by_label("API key").fill(key)
            self.page.get_by_role("button", name="Sign in", exact=True).click()
        self.page.locator("#entry:focus").wait_for()  # ready to type
        self.page.get_by_label("Temperature").fill("0")

    def close(self) -> None:
        self._context.close()

    def send(self, text: str) -> str:
        """Send a message, wait for its answer, return it."""
        before = self.answers.count()
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.get_by_label("Message", exact=True).press("Enter")
        return self.wait_for_answer(before)

    def wait_for_answer(self, before: int) -> str:
        self.answers.nth(before).wait_for()
        self.page.get_by_role("button", name="Send", exact=True).wait_for()
        return str(self.answers.nth(before).locator(".text").last.inner_text())

    @property
    def answers(self) -> Any:
        return self.page.locator("article.answer:not(.writing)")

    @property
    def listed(self) -> Any:
        return self.page.locator("#sessions button")


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    opened: list[Tab] = []

    def new(server: Running, **options: Any) -> Tab:
        opened.append(Tab(browser, server, **options))
        return opened[-1]

    yield new
    for each in opened:
        each.close()
    assert [fault for each in opened for fault in each.faults] == []


@needs_browser
def test_a_conversation_in_a_browser(serve: Callable[..., Running], tab: Callable[..., Tab]) -> None:
    server = serve({"snapkv": load_stack("snapkv")}, api_keys=(KEY,))
    here = tab(server, key=KEY)
    page = here.page

    here.send(FACT["content"])
    assert "amber falcon river" in here.send(QUESTION["content"])
    assert here.answers.count() == 2 and here.listed.count() == 1
    panel = here.answers.last.get_by_role("region", name="What the policies did")
    assert "Stack loopserve" in panel.inner_text() and "KV per token" in panel.inner_text()
    strip = panel.get_by_role("listbox")
    strip.focus()
    page.keyboard.press("Home")
    assert panel.locator(".readout").inner_text().startswith("Turn 1, tokens 0 to")
    assert strip.get_by_role("option").count() == strip.get_by_role("option", selected=True).count() + (
        strip.get_by_role("option", selected=False).count()
    )
    page.keyboard.press("End")
    assert panel.locator(".readout").inner_text().startswith("This answer:")

    # Another stack, by the chooser.
    page.get_by_label("Stack").select_option("snapkv")
    here.send(QUESTION["content"])
    assert "Stack snapkv" in here.answers.last.inner_text()

    # Undo gives the message back; the conversation is shorter.
    page.get_by_role("button", name="Undo last turn").click()
    here.answers.nth(2).wait_for(state="detached")
    assert page.get_by_label("Message", exact=True).input_value() == QUESTION["content"]
    page.get_by_label("Message", exact=True).fill("")

    # Regenerate keeps one session; an edit begins another and leaves the first as it was.
    page.get_by_role("button", name="Regenerate").click()
    page.locator(".writing").wait_for(state="detached")
    here.wait_for_answer(1)
    assert here.answers.count() == 2 and here.listed.count() == 1
    page.get_by_role("button", name="Edit this message and branch").last.click()
    page.get_by_label("Changed message").fill("the code of oslo is copper lantern meadow .")
    page.get_by_label("Changed message").press("Enter")
    here.listed.nth(1).wait_for()
    here.wait_for_answer(1)
    assert "oslo" in page.locator(".said").last.inner_text()
    here.listed.nth(1).click()
    page.get_by_text(QUESTION["content"]).wait_for()
    assert here.answers.count() == 2 and page.get_by_text("oslo").count() == 0

    # A reload goes on where it was, with the key of this tab.
    page.reload()
    page.get_by_text(QUESTION["content"]).wait_for()

    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(download.value.path().read_text())
    assert len(exported["turns"]) == 2 and exported["turns"][1]["messages"][-1]["content"] == QUESTION["content"]

    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    here.listed.nth(1).wait_for(state="detached")
    assert here.listed.count() == 1 and here.answers.count() == 0
    assert here.addresses == {f"127.0.0.1:{server.port}"}


@needs_browser
def test_a_wrong_key_is_refused_and_asked_for_again(serve: Callable[..., Running], tab: Callable[..., Tab]) -> None:
    server = serve(api_keys=(KEY,))
    here = tab(server, key=KEY)
    here.page.get_by_role("button", name="Sign out").click()
    here.page.get_by_label("API key").fill("another")
    here.page.get_by_label("API key").press("Enter")
    here.page.get_by_text("does not know this key").wait_for()
    assert here.page.evaluate("sessionStorage.length") == 0


@needs_browser
def test_escape_stops_an_answer_which_leaves_no_trace(
    server: Running, tab: Callable[..., Tab], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tab(server)
    here.send(FACT["content"])
    worker, stop_ids = server.conversations.worker, server.conversations.engine.stop_ids
    step, steps, gate = worker.scheduler.step, count(), threading.Event()
    monkeypatch.setattr(worker.scheduler, "step", lambda: (next(steps) < 4 or gate.wait(60)) and step())
    monkeypatch.setattr(server.conversations.engine, "stop_ids", frozenset())  # ends only when it is cancelled
    here.page.get_by_label("Message", exact=True).fill(QUESTION["content"])
    here.page.get_by_label("Message", exact=True).press("Enter")
    here.page.get_by_role("button", name="Stop").wait_for()
    here.page.keyboard.press("Escape")
    here.page.get_by_text("this is not part of the conversation").wait_for()
    until(lambda: worker.admitted == 0)
    gate.set()
    until(lambda: not worker.scheduler.running)
    (session,) = json.loads(get(server, "/v1/sessions")[1])["data"]
    assert session["turns"] == 1
    monkeypatch.setattr(server.conversations.engine, "stop_ids", stop_ids)
    here.page.get_by_role("button", name="Try again").click()
    here.page.get_by_text("this is not part of the conversation").wait_for(state="detached")
    here.wait_for_answer(1)
    assert "amber falcon river" in here.answers.last.inner_text()


@needs_browser
def test_hostile_text_stays_text(
    server: Running, tab: Callable[..., Tab], monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    read = engine.tokenizer.read_answer
    monkeypatch.setattr(
        engine.tokenizer, "read_answer", lambda *given, **more: replace(read(*given, **more), text=HOSTILE)
    )
    here = tab(server)
    here.send(HOSTILE)
    page, answer = here.page, here.answers.last
    assert page.title() == "loopserve"
    assert page.locator("#log img, #log script, #log iframe").count() == 0
    assert "<img src=x" in page.locator(".said").inner_text() and "<img src=x" in answer.inner_text()
    links = answer.locator("a")
    assert [links.nth(i).get_attribute("href") for i in range(links.count())] == [
        "https://example.org/a",
        "https://example.org/p.png",
    ]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert answer.locator("strong").inner_text() == "bold" and answer.locator("em").inner_text() == "leaning"
    assert answer.locator("li li").inner_text() == "two" and answer.locator("pre").inner_text() == "<script>1</script>"
    assert answer.get_by_role("heading", name="Heading").count() == 1
    assert here.addresses == {f"127.0.0.1:{server.port}"}


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => .2126 * channel(c[0]) + .7152 * channel(c[1]) + .0722 * channel(c[2]);
  const read = (text) => text.match(/[\\d.]+/g).map(Number);
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
    if (!own || !node.checkVisibility() || node.disabled) continue;
    let back = node;
    while (back && read(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
    const [one, two] = [getComputedStyle(node).color, getComputedStyle(back).backgroundColor].map((each) => light(read(each)));
    const ratio = (Math.max(one, two) + .05) / (Math.min(one, two) + .05);
    if (ratio < 4.5) low.push([node.tagName, node.textContent.slice(0, 30), ratio]);
  }
  return low;
}"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_and_fits_a_phone(server: Running, tab: Callable[..., Tab], scheme: str) -> None:
    here = tab(server, color_scheme=scheme)
    page = here.page
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    here.send(FACT["content"])
    assert page.evaluate(CONTRAST) == []
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.documentElement.scrollHeight") <= 740
    assert page.get_by_role("button", name="Send", exact=True).bounding_box()["x"] > 180
    assert not here.listed.first.is_visible()
    page.get_by_role("button", name="Conversations").click()
    assert here.listed.first.is_visible() and page.evaluate(CONTRAST) == []
    page.keyboard.press("Escape")
    assert not here.listed.first.is_visible() and page.evaluate("document.activeElement.id") == "show-list"
    page.get_by_role("button", name="colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    assert page.evaluate(CONTRAST) == []


@needs_browser
def test_every_control_has_a_name(server: Running, tab: Callable[..., Tab]) -> None:
    here = tab(server)
    here.send(FACT["content"])
    unnamed = here.page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, [tabindex]:not(pre)')].filter((each) =>"
        " !each.textContent.trim() && !each.getAttribute('aria-label') && !each.labels?.length).map((each) => each.outerHTML)"
    )
    assert unnamed == []
    assert here.page.locator("[role=log]").count() == here.page.locator("[role=status]").count() == 1
    here.page.get_by_label("Message", exact=True).fill("one")
    here.page.get_by_label("Message", exact=True).press("Shift+Enter")
    assert here.page.get_by_label("Message", exact=True).input_value() == "one\n"
