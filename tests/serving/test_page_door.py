"""The chat page's door: who gets in, to which paths, and what happens without the extra ``web``."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from http.cookies import SimpleCookie
from pathlib import Path

import httpx
import pytest

from running_server import KEYS, RunningServer, Serve
from semsharekv_integrations.cli.demo_calls import make_world_news
from semsharekv_integrations.cli.demo_page import has_browser
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.serving import app as app_module
from semsharekv_integrations.serving.entrance import COOKIE, Visits

pytestmark = pytest.mark.enable_socket
OURS = ("/config", "/gradio_api/queue/data?session_hash=a", "/gradio_api/heartbeat/a")
NOT_OURS = (
    *("/gradio_api/runs", "/gradio_api/info", "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/monitoring"),
    *("/gradio_api/proxy=http://localhost", "/gradio_api/run/predict", "/nothing", "/v1/nothing"),
)


@pytest.fixture
def page() -> None:
    pytest.importorskip("gradio", reason="the extra web is not installed")


def log_in(server: RunningServer, key: str = KEYS[0]) -> httpx.Client:
    answer = httpx.post(f"{server.url}/login", data={"key": key})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    return httpx.Client(base_url=server.url, cookies=answer.cookies)


def ask_queue(client: httpx.Client) -> int:
    """Join Gradio's queue with an event of the page: here, that it was opened."""
    config = client.get("/config").json()
    (load,) = [each for each in config["dependencies"] if ["load"] in [target[1:] for target in each["targets"]]]
    body = {"data": [None], "fn_index": load["id"], "session_hash": "abc", "trigger_id": None, "event_data": None}
    return client.post("/gradio_api/queue/join", json=body).status_code


def test_without_the_extra_the_page_says_how_to_get_it_and_the_rest_works(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "has_page", lambda: False)
    server = serve(page=True).wait_until_loaded()
    told = httpx.get(f"{server.url}/")
    assert told.status_code == 200 and 'pip install -e ".[web]"' in told.text and told.text.count("\n") == 1
    assert server.connect().models.list().data[0].id == "tiny"
    assert httpx.get(f"{server.url}/nothing").json()["error"]["code"] == "not_found"


def test_the_demo_page_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = app_module.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest))
    assert main(["demo", "--web", "--no-browser"]) == 2
    assert 'needs gradio: pip install -e ".[web]"' in " ".join(capsys.readouterr().err.split())
    assert main(["demo", "--web", "--port", "70000"]) == 2


@pytest.mark.usefixtures("page")
class TestPage:
    def test_without_keys_everybody_of_this_machine_gets_in(self, serve: Serve) -> None:
        server = serve(api_keys=(), page=True)
        with httpx.Client(base_url=server.url) as client:
            answer = client.get("/")
            assert answer.status_code == 200 and "gradio" in answer.text and ask_queue(client) == 200
            assert client.get("/login").status_code == 404
            assert client.get("/v1/completions").status_code == 405, "not the page's"
            assert client.head("/health").status_code in (200, 503)
            assert client.get("/", headers={"Host": "evil.example"}).status_code == 403

    def test_with_keys_nobody_gets_in_without_one(self, serve: Serve) -> None:
        server = serve(page=True)
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/").headers["location"] == "/login"
            assert [client.get(path).status_code for path in OURS] == [401] * len(OURS)
            assert client.post("/gradio_api/queue/join", json={}).status_code == 401
            for wrong in ("", "no-key", KEYS[0][:-1], f"{KEYS[0]}x", "é"):
                answer = client.post("/login", data={"key": wrong})
                assert answer.status_code == 401 and "not known" in answer.text and COOKIE not in client.cookies
            assert client.post("/login", content="key=" + "a" * 5000).status_code == 413
            client.cookies.set(COOKIE, "made-up")
            assert client.get("/").headers["location"] == "/login"
            assert client.get("/", headers={"Authorization": f"Bearer {KEYS[0]}x"}).status_code == 303

    @pytest.mark.parametrize("key", KEYS)
    def test_a_key_lets_in_until_the_visitor_leaves(self, serve: Serve, key: str) -> None:
        server = serve(page=True)
        with log_in(server, key) as client:
            assert client.get("/").status_code == 200 and ask_queue(client) == 200
            token = client.cookies[COOKIE]
            assert key not in token
            client.get("/logout")
            assert COOKIE not in client.cookies and client.get("/").status_code == 303
            client.cookies.set(COOKIE, token)
            assert client.get("/").status_code == 303, "the token is no good any more"

    def test_a_browser_keeps_the_token_to_itself(self, serve: Serve) -> None:
        answer = httpx.post(f"{serve(page=True).url}/login", data={"key": KEYS[0]})
        cookie = SimpleCookie(answer.headers["set-cookie"])[COOKIE]
        assert cookie["httponly"] and cookie["samesite"] == "strict" and cookie["path"] == "/"

    def test_another_page_cannot_log_a_visitor_in(self, serve: Serve) -> None:
        headers = {"Origin": "https://evil.example"}
        assert httpx.post(f"{serve(page=True).url}/login", data={"key": KEYS[0]}, headers=headers).status_code == 403

    def test_gradio_answers_what_the_page_needs_and_nothing_else(self, serve: Serve) -> None:
        with log_in(serve(page=True)) as client:
            for path in NOT_OURS:
                for method in ("GET", "POST"):
                    answer = client.request(method, path)
                    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", path

    def test_a_session_is_read_by_its_own_tenant_alone(self, serve: Serve) -> None:
        server = serve(page=True)
        with log_in(server, KEYS[0]) as one, log_in(server, KEYS[1]) as other:
            for client, status in ((one, 200), (other, 404)):
                for path in OURS[1:]:
                    with client.stream("GET", path, timeout=60) as answer:
                        assert answer.status_code == status

    def test_the_page_may_load_nothing_from_elsewhere(self, serve: Serve) -> None:
        with log_in(serve(page=True)) as client:
            for path in ("/", "/login"):
                policy = client.get(path).headers["content-security-policy"]
                assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy

    def test_the_api_is_as_before(self, serve: Serve) -> None:
        server = serve(page=True).wait_until_loaded()
        with log_in(server) as client:
            assert client.get("/v1/models").status_code == 401, "the page's token is no key"
        answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [{}], "x": 1})
        assert answer.json()["error"]["code"] == "unknown_parameter"

    def test_the_demo_shows_its_articles_and_says_where(self) -> None:
        command = [sys.executable, "-m", "semsharekv_integrations", "demo", "--web", "--no-browser"]
        options = ["--model", "semsharekv/reference", "--documents", "3", "--json"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            shown = httpx.get(f"{url}/config").text
            assert "3 of 3 in the prompt" in shown and all(town in shown for town in read_towns(3))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130, -signal.SIGINT)
        finally:
            process.kill()

    def test_what_a_visitor_sends_that_is_no_event_is_not_logged(
        self, serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        secret = "hollyhock"
        server = serve(page=True)
        with caplog.at_level(logging.DEBUG), log_in(server) as client:
            config = client.get("/config").json()
            for each in config["dependencies"]:
                data = [None, *[{"what": secret, "key": secret, "name": secret}] * 3][: len(each["inputs"])]
                body = {"data": data, "fn_index": each["id"], "session_hash": "abc", "event_data": {"place": secret}}
                client.post("/gradio_api/queue/join", json=body)
            with client.stream("GET", "/gradio_api/queue/data?session_hash=abc", timeout=60) as told:
                assert any("close_stream" in line for line in told.iter_lines())
        own = [record for record in caplog.records if record.name.startswith(("semsharekv", "uvicorn", "fastapi"))]
        assert all(secret not in record.getMessage() for record in own)
        assert secret not in "".join(capfd.readouterr())


def read_towns(number: int) -> list[str]:
    return list(make_world_news(number, seed=7).articles)


@pytest.mark.parametrize("screen", [None, ":0"])
def test_a_browser_is_opened_where_there_is_one(monkeypatch: pytest.MonkeyPatch, screen: str | None) -> None:
    found: list[str | None] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("webbrowser.get", lambda: found.append("asked"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if screen:
        monkeypatch.setenv("DISPLAY", screen)
    assert has_browser() == bool(screen) == bool(found)


def test_visits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("semsharekv_integrations.serving.entrance._MOST_VISITS", 2)
    visits = Visits()
    tokens = [visits.begin(name) for name in ("a", "b", "c")]
    assert [visits.find_tenant(token) for token in tokens] == [None, "b", "c"]
    visits.end(tokens[1])
    assert [visits.find_tenant(token) for token in tokens] == [None, None, "c"]
    now[0] = 8 * 24 * 3600.0
    assert visits.find_tenant(tokens[2]) is None


def test_the_assets_are_in_the_package() -> None:
    folder = Path(app_module.__file__).parent / "web"
    assert {path.name for path in folder.iterdir()} == {"page.css", "documents.js", "head.js", "talk.js", "talks.js"}
    assert all("http:" not in path.read_text() and "https:" not in path.read_text() for path in folder.iterdir())
