"""``semsharekv demo --web``: the chat page, with the demo's articles in it."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable, Mapping

from semsharekv_integrations.engine import SemShareEngine


def serve_page(
    engine: SemShareEngine,
    title: str,
    articles: Mapping[str, str],
    port: int,
    *,
    opens: bool,
    tell: Callable[[str], object],
) -> None:
    """Serve the page on this machine alone until Ctrl-C; ``tell`` gets its address once it is there.

    Args:
        engine: what answers.
        title: what the page calls the model.
        articles: texts by name that visitors begin with.
        port: to listen at; 0 for a free one.
        opens: whether a browser is opened, if there is one.
        tell: called with the address.
    """
    from semsharekv_integrations.serving import ServerConfig, create_app
    from semsharekv_integrations.serving.running import Server

    def announce(url: str) -> None:
        tell(url)
        if opens and has_browser():
            webbrowser.open(url)

    app = create_app(engine, ServerConfig(model=title), documents=articles)
    Server(app, port=port, on_start=announce, log_level="warning").run()


def has_browser() -> bool:
    """Whether there is a screen to show a browser on, and one that can be opened."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True
