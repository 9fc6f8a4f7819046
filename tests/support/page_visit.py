"""A visit to the chat page by a headless Chromium: what a person does there, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserType, Locator, Page

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1"),
)
_WAIT_MS = 120_000
# The lowest contrast of what is written on the page: of every element with text of its own that is not dimmed.
_LOWEST_CONTRAST = """() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return [...found.slice(0, 3), found[3] ?? 1];
  };
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    let [r, g, b] = [255, 255, 255];
    for (const [x, y, z, a] of layers.reverse()) [r, g, b] = [r + (x - r) * a, g + (y - g) * a, b + (z - b) * a];
    return [r, g, b];
  };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  let lowest = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const dimmed = "[aria-disabled=true], :disabled, .skv-hide, style, script";
    if (!own || !element.checkVisibility() || element.closest(dimmed)) continue;
    const [one, other] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, element.className + ": " + element.textContent.slice(0, 40)];
  }
  return lowest;
}"""


class PageVisit:
    """One visitor's page.

    Attributes:
        urls: of everything that the browser asked for.
        errors: what its console said of errors.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.urls: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(_WAIT_MS)
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, url: str) -> PageVisit:
        self.page.goto(url)
        return self.wait_until_ready()

    def wait_until_ready(self) -> PageVisit:
        self.page.get_by_label("Question").wait_for()
        self.page.wait_for_function("() => document.querySelectorAll('[data-ready]').length === 4")
        return self

    @property
    def documents(self) -> list[str]:
        return [each.get_attribute("title") or "" for each in self.page.locator(".skv-name").all()]

    @property
    def hosts(self) -> set[str | None]:
        return {urlsplit(url).hostname for url in self.urls if urlsplit(url).scheme not in ("data", "blob")}

    def upload(self, name: str, content: bytes) -> None:
        """Upload a file, and wait for what the page says to it."""
        file: Any = {"name": name, "mimeType": "text/plain", "buffer": content}
        self.do(lambda: self.page.locator("input[type=file]").set_input_files(file), name)

    def do(self, act: Callable[[], object], said: str) -> str:
        """Do something, wait until the page tells of it with the words ``said``, and return what it says."""
        act()
        notice = self.page.locator(".skv-notice", has_text=said)
        notice.wait_for()
        return notice.inner_text()

    def ask(self, question: str, *, beside: bool = False) -> Locator:
        """Ask, wait for the answer, and return its turn."""
        self.page.get_by_label("Also ask with off").set_checked(beside)
        return self.send(question, beside=beside)

    def send(self, question: str, *, beside: bool = False) -> Locator:
        """Write a question into the focused or else the usual box, press Enter, and return the turn once answered."""
        turns = self.page.locator(".skv-turn")
        number = turns.count()
        self.page.get_by_label("Question").fill(question)
        self.page.get_by_label("Question").press("Enter")
        turn = turns.nth(number)
        turn.locator(".skv-same" if beside else ".skv-panel").wait_for()
        self.page.wait_for_function("() => !document.querySelector('.skv-caret')")
        return turn

    def drag(self, name: str, onto: str) -> None:
        """Drag a document by its grip to just below another one."""
        row, target = (self.page.locator(".skv-doc").nth(self.documents.index(each)) for each in (name, onto))
        grip, below = row.locator(".skv-grip").bounding_box(), target.bounding_box()
        assert grip is not None and below is not None
        self.page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(below["x"] + 10, below["y"] + below["height"] - 2, steps=6)
        self.do(self.page.mouse.up, f"{name} is now number")

    def press_until(self, key: str, selector: str, most: int = 80) -> None:
        """Press a key until what ``selector`` names has the focus. Whatever gets it on the way shows that."""
        for _ in range(most):
            self.page.keyboard.press(key)
            width = self.page.evaluate("() => parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
            is_body = self.page.evaluate("() => document.activeElement === document.body")
            style = self.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            hidden = self.page.evaluate("() => document.activeElement.matches('.skv-hide')")  # its label shows it
            assert is_body or hidden or (width >= 2 and style != "none"), "the focus is seen"
            if self.page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{key} does not lead to {selector}")

    def find_lowest_contrast(self) -> tuple[float, str]:
        self.page.wait_for_function("() => document.getAnimations().length === 0")  # colours have changed
        ratio, where = self.page.evaluate(_LOWEST_CONTRAST)
        return ratio, where

    @property
    def is_dark(self) -> bool:
        red, green, blue = self.page.evaluate(
            "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        return red + green + blue < 384

    @property
    def overflow(self) -> int:
        """By how many pixels the page, or anything on it that scrolls by itself not, is wider than the window."""
        return self.page.evaluate(
            "() => Math.max(document.documentElement.scrollWidth, ...[...document.querySelectorAll('main *')]"
            ".filter((each) => each.checkVisibility() && !each.closest('.skv-scroll, .skv-hide'))"
            ".map((each) => each.getBoundingClientRect().right)) - window.innerWidth"
        )


def count_origins(turn: Locator) -> dict[str, int]:
    """How many runs of each origin a turn's panel shows."""
    kinds = ("prefix", "identical", "fuzzy", "computed")
    return {kind: turn.locator(f".skv-prompt .skv-{kind}").count() for kind in kinds}


def count_reused(turn: Locator) -> int:
    return int(turn.locator("[data-reused]").get_attribute("data-reused") or -1)


def launch(chromium: BrowserType) -> Browser:
    return chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))


@contextmanager
def visit(browser: Browser, width: int = 1440, height: int = 900, **options: Any) -> Iterator[PageVisit]:
    """A visitor of their own, with a window of this size; nothing of other visits is known to the browser's context."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        yield PageVisit(context.new_page())
    finally:
        context.close()


def list_texts(locators: Sequence[Locator]) -> list[str]:
    return [each.inner_text() for each in locators]
