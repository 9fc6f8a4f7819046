"""The chat page in a real browser: Debian's Chromium, without a window.

``SEMSHAREKV_SCREENSHOTS=FOLDER`` has the tests write what docs/ shows there.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from page_visit import CHROMIUM, PageVisit, count_origins, count_reused, launch, visit
from running_server import KEYS, RunningServer, Serve, wait_until
from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, world
from semsharekv_integrations.report import GenerationChunk
from semsharekv_integrations.serving import ServerConfig

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest.importorskip("gradio", reason="the extra web is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there: apt-get install chromium"),
]
NEWS = {each.town: each.text for each in world.make_documents(random.Random(7), 5)}
TOWNS = list(NEWS)
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>{{#if a}}${window.hacked=1}"
Visit = Callable[..., AbstractContextManager[PageVisit]]
WHO = f"Who is the mayor of {TOWNS[0]}?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as running, launch(running.chromium) as browser:
        yield browser


@pytest.fixture
def look(browser: Browser) -> Visit:
    return partial(visit, browser)


@pytest.fixture(scope="module")
def moving() -> Iterator[RunningServer]:
    with serve_news("identical") as running:
        yield running


def serve_news(mode: str) -> RunningServer:
    reuse: Any = ReuseConfig(mode=mode, report_origins=True)  # type: ignore[arg-type]
    engine = SemShareEngine.from_pretrained("semsharekv/reference", EngineConfig(reuse=reuse))
    _ = engine.model
    return RunningServer(engine, ServerConfig(model="semsharekv/reference"), documents=NEWS)


def save(page: PageVisit, name: str) -> None:
    """Take a screenshot, if a folder for them is given."""
    folder = os.environ.get("SEMSHAREKV_SCREENSHOTS")
    if folder:
        page.page.mouse.move(0, 0)
        page.page.screenshot(path=Path(folder) / f"{name}.png")


def test_documents_are_moved_by_hand_and_what_moved_is_not_computed_again(moving: RunningServer, look: Visit) -> None:
    with look() as page:
        page.open(moving.url)
        assert page.documents == TOWNS
        first = page.ask(WHO)
        assert count_reused(first) == 0 and set(filter(count_origins(first).get, count_origins(first))) == {"computed"}
        page.drag(TOWNS[0], onto=TOWNS[3])
        assert page.documents == [*TOWNS[1:4], TOWNS[0], TOWNS[4]]
        second = page.ask(WHO, beside=True)
        assert count_reused(second) > 0 and count_origins(second)["identical"] > 0
        titles = [each.get_attribute("title") or "" for each in second.locator(".skv-prompt .skv-identical").all()]
        assert all(title.startswith("moved, ") for title in titles)
        assert {title.rpartition(": ")[2] for title in titles} & set(TOWNS)
        shown = second.locator(".skv-prompt").inner_text()
        assert [town for _, town in sorted((shown.index(NEWS[town]), town) for town in TOWNS)] == page.documents
        assert second.locator(".skv-times").get_attribute("data-full") == "measured"
        second.evaluate("(turn) => turn.scrollIntoView()")
        save(page, "page-light")
        page.page.get_by_role("button", name="Dark theme").click()
        assert page.is_dark
        second.evaluate("(turn) => turn.scrollIntoView()")
        save(page, "page-dark")
        assert page.hosts == {"127.0.0.1"} and not page.errors


def test_off_beside_an_exact_answer_says_the_same(look: Visit) -> None:
    with serve_news("exact") as server, look() as page:
        page.open(server.url)
        full = page.ask(WHO)
        assert "estimated" not in (full.locator(".skv-times").get_attribute("data-full") or "")
        page.do(page.page.get_by_label(f"Move {TOWNS[4]} up").click, "is now number")
        turn = page.ask(f"What was the cost in {TOWNS[1]}?", beside=True)
        assert count_reused(turn) > 0 and count_origins(turn)["prefix"] > 0 and not count_origins(turn)["identical"]
        answers = turn.locator(".skv-answer")
        assert answers.count() == 2
        one, other = (answers.nth(at).locator(".skv-text").inner_text() for at in range(2))
        assert one == other != "" and turn.locator(".skv-same").get_attribute("data-same") == "true"
        assert all("to the first token" in answers.nth(at).inner_text() for at in range(2))
        told = server.engine.stats()["requests"]
        assert told == 2 and server.app.state.host.full_engine.stats()["requests"] == 1
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        assert "semsharekv_requests_total 3.0" in lines
        assert any(line.startswith('semsharekv_call_ttft_seconds_count{mode="off"} 1') for line in lines)


def test_documents_come_and_go(moving: RunningServer, look: Visit) -> None:
    with look() as page:
        page.open(moving.url)
        page.upload("notes.txt", "Ünïcode 漢字 🙂 in a note.".encode())
        assert page.documents == [*TOWNS, "notes.txt"]
        page.upload("photo.png", b"\x89PNG\x00")
        page.upload("latin.txt", "café".encode("latin-1"))
        page.upload("blank.md", b" \n")
        page.upload("large.txt", b"a" * (1024**2 + 1))
        assert page.documents == [*TOWNS, "notes.txt"]
        page.page.get_by_role("button", name="Paste a text").click()
        page.page.get_by_label("Name").fill("pasted")
        page.page.get_by_label("Text", exact=True).fill("A pasted text.")
        page.do(page.page.get_by_role("button", name="Add document").click, "pasted is added")
        page.do(page.page.get_by_role("button", name="Add document").click, "is empty")
        for town in TOWNS:
            page.do(page.page.get_by_role("switch", name=f"Use {town}").click, "out of the prompt")
        turn = page.ask("What is in the note?")
        shown = turn.locator(".skv-prompt").inner_text()
        assert "Ünïcode 漢字 🙂 in a note." in shown and "A pasted text." in shown
        assert not any(text in shown for text in NEWS.values())
        page.do(page.page.get_by_label("Remove notes.txt").click, "removed")
        assert page.documents == [*TOWNS, "pasted"]


def test_conversations_are_apart(moving: RunningServer, look: Visit) -> None:
    with look() as page, look() as other:
        page.open(moving.url)
        other.open(moving.url)
        page.ask(WHO)
        page.ask("What was the cost?")
        page.page.get_by_role("button", name="New", exact=True).click()
        page.page.locator(".skv-empty").wait_for()
        third = page.ask("When was it?")
        assert WHO not in third.locator(".skv-prompt").inner_text()
        page.page.get_by_role("button", name=WHO).click()
        page.page.locator(".skv-asked", has_text="What was the cost?").wait_for()
        assert page.page.locator(".skv-asked").all_inner_texts() == [WHO, "What was the cost?"]
        assert other.page.locator(".skv-turn").count() == 0, "of another visitor"
        other.ask("Who?")
        assert other.page.locator(".skv-asked").all_inner_texts() == ["Who?"]


def test_a_phone_needs_no_scrolling_sideways(moving: RunningServer, look: Visit) -> None:
    with look(375, 812, has_touch=True, is_mobile=True) as page:
        page.open(moving.url)
        assert page.overflow <= 0
        turn = page.ask(WHO, beside=True)
        assert page.overflow <= 0
        turn.locator(".skv-asked").scroll_into_view_if_needed()
        save(page, "page-phone-light")
        page.page.get_by_role("button", name="Dark theme").click()
        turn.locator(".skv-legend").scroll_into_view_if_needed()
        save(page, "page-phone-dark")
        page.page.get_by_role("button", name="Paste a text").click()
        page.upload(f"{'A-long-name-' * 6}.txt", b"Long" * 200)
        page.ask("Who? " * 60, beside=True)
        page.upload(f"{'B-long-name-' * 6}.png", b"")
        assert page.overflow <= 0
        page.page.get_by_role("button", name="New", exact=True).click()
        page.page.locator(".skv-empty").wait_for()
        assert page.overflow <= 0


def test_the_keyboard_is_enough(moving: RunningServer, look: Visit) -> None:
    with look() as page:
        page.open(moving.url)
        page.page.evaluate("() => document.activeElement.blur()")
        down = f"button[aria-label='Move {TOWNS[0]} down']"
        page.press_until("Tab", down)
        page.do(lambda: page.page.keyboard.press("Enter"), f"{TOWNS[0]} is now number 2")
        assert page.documents[:2] == [TOWNS[1], TOWNS[0]]
        page.page.wait_for_function("(it) => document.activeElement.matches(it)", arg=down)
        page.press_until("Shift+Tab", f"button[aria-label='Use {TOWNS[0]}']")
        page.do(lambda: page.page.keyboard.press("Space"), "out of the prompt")
        page.press_until("Tab", "textarea")
        while page.page.evaluate("() => document.activeElement.closest('label')?.innerText.trim()") != "Question":
            page.press_until("Tab", "textarea")
        page.page.keyboard.type(WHO)
        page.page.keyboard.press("Enter")
        page.page.locator(".skv-panel").wait_for()
        assert NEWS[TOWNS[0]] not in page.page.locator(".skv-prompt").inner_text()
        page.press_until("Shift+Tab", ".skv-prompt")
        unnamed = page.page.evaluate(
            "() => [...document.querySelectorAll('main button, main input, main textarea')]"
            ".filter((each) => each.checkVisibility())"
            ".filter((each) => !(each.ariaLabel || each.innerText.trim() || each.labels?.length))"
            ".map((each) => each.outerHTML)"
        )
        assert unnamed == [], "a screen reader has a name for everything"


def test_the_theme_follows_the_system_until_it_is_set(moving: RunningServer, look: Visit) -> None:
    with look(color_scheme="dark") as page:
        page.open(moving.url)
        assert page.is_dark
        page.page.emulate_media(color_scheme="light")
        page.open(moving.url)
        assert not page.is_dark
        page.upload("photo.png", b"\x89PNG")
        page.ask(WHO, beside=True)
        page.ask("And who else?")
        ratio, where = page.find_lowest_contrast()
        assert ratio >= 4.5, where
        page.page.get_by_role("button", name="Dark theme").click()
        assert page.is_dark
        ratio, where = page.find_lowest_contrast()
        assert ratio >= 4.5, where
        page.open(moving.url)
        page.page.wait_for_function("() => document.body.classList.contains('dark')")
        for scheme in ("dark", "light"):
            page.page.emulate_media(color_scheme=scheme)
            assert page.is_dark, "as it was set"


def test_what_visitors_and_models_write_is_text(look: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_news("exact") as server, look() as page:
        stream = server.engine.astream

        async def write(*args: Any, **options: Any) -> Any:
            yield GenerationChunk(HOSTILE)
            async for chunk in stream(*args, **options):
                if chunk.generation is not None:
                    object.__setattr__(chunk.generation, "text", HOSTILE)
                yield chunk

        monkeypatch.setattr(server.engine, "astream", write)
        page.open(server.url)
        page.upload(f"{HOSTILE[:40]}.txt", HOSTILE.encode())
        turn = page.ask(HOSTILE)
        for part in (".skv-asked", ".skv-text", ".skv-prompt"):
            assert HOSTILE in turn.locator(part).inner_text(), part
        assert page.documents[-1].startswith("<img src=x")
        assert page.page.evaluate("() => window.hacked") is None
        assert page.page.locator("main img[src=x], main script").count() == 0


@pytest.mark.parametrize("stays", [True, False])
def test_a_visitor_who_leaves_or_says_so_stops_the_answer(
    serve: Serve, endless: SemShareEngine, look: Visit, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    monkeypatch.setattr("semsharekv_integrations.serving.page_asking.MOST_ANSWER_TOKENS", 4000)
    server = serve(endless, page=True, api_keys=()).wait_until_loaded()
    with look() as page:
        page.open(server.url)
        page.page.get_by_label("Question").fill("Who?")
        page.page.get_by_label("Question").press("Enter")
        page.page.wait_for_function("() => document.querySelector('.skv-text')?.textContent")
        assert server.num_taken == 1
        if stays:
            page.page.get_by_role("button", name="Stop").click()
            page.page.locator(".skv-note", has_text="stopped").wait_for()
            wait_until(lambda: server.num_taken == 0)
    wait_until(lambda: server.num_taken == 0)
    wait_until(lambda: endless.stats()["requests"] == 1)
    assert endless.stats()["output_tokens"] < 4000


def test_where_too_many_ask_a_visitor_is_told_to_come_again(serve: Serve, look: Visit) -> None:
    server = serve(page=True, api_keys=(), max_requests=1).wait_until_loaded()
    host = server.app.state.host
    with look() as page:
        page.open(server.url)
        host._taken += 1
        page.page.get_by_label("Question").fill("Who?")
        page.page.get_by_label("Question").press("Enter")
        page.page.locator(".skv-error", has_text="try again in a moment").wait_for()
        host._taken -= 1
        assert page.ask("Who?").locator(".skv-text").is_visible()


def test_a_key_opens_the_page_of_its_tenant(
    serve: Serve, look: Visit, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve(page=True).wait_until_loaded()
    with look() as page, caplog.at_level(logging.DEBUG):
        page.page.goto(server.url)
        page.page.get_by_label("API key").fill("wrong")
        page.page.keyboard.press("Enter")
        page.page.get_by_role("alert").wait_for()
        page.page.get_by_label("API key").fill(KEYS[1])
        page.page.keyboard.press("Enter")
        page.wait_until_ready()
        page.upload("hollyhock.txt", b"In hollyhock time the mayor of Velmar is Anna Kelsen.")
        page.ask("What is a hollyhock?")
        tenants = [server.config.find_tenant(key) for key in KEYS]
        assert [bool(server.engine.store.references(str(tenant))) for tenant in tenants] == [False, True]
        page.page.get_by_role("link", name="Log out").click()
        page.page.get_by_label("API key").wait_for()
        assert page.hosts == {"127.0.0.1"}
    assert not any("hollyhock" in record.getMessage() for record in caplog.records), "nothing of a prompt is logged"
    assert "hollyhock" not in "".join(capfd.readouterr())
