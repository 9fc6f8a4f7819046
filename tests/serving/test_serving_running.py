"""Servers under load: callers who leave, callers who come too early or in too great numbers, and the end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from running_server import KEYS, RunningServer, Serve, wait_until
from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.serving import ServerConfig, create_app

pytestmark = pytest.mark.enable_socket
CHAT, DOCUMENTS = "/v1/chat/completions", "/v1/documents"
LONG: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Who is the mayor?"}]}
LONG |= {"temperature": 1.0, "seed": 1, "max_tokens": 4000}
SHORT = {**LONG, "max_tokens": 1}


def leave_early(server: RunningServer, *, stream: bool) -> None:
    """Ask for a long answer, and go away when it has begun."""
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    if stream:
        with httpx.stream("POST", f"{server.url}{CHAT}", json={**LONG, "stream": True}, headers=headers) as response:
            next(response.iter_lines())
        return
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{CHAT}", json=LONG, headers=headers, timeout=httpx.Timeout(60, read=0.5))


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_stops_the_answer(serve: Serve, endless: SemShareEngine, stream: bool) -> None:
    server = serve(endless).wait_until_loaded()
    leave_early(server, stream=stream)
    wait_until(lambda: server.num_taken == 0)
    wait_until(lambda: endless.stats()["requests"] == 1)
    assert endless.stats()["output_tokens"] < LONG["max_tokens"]
    assert server.post(CHAT, SHORT).status_code == 200


async def test_a_caller_who_leaves_before_the_first_event_frees_its_place(endless: SemShareEngine) -> None:
    """It is gone when the answer has begun, and nothing of it was sent."""
    app, ended = create_app(endless, ServerConfig(model="tiny")), asyncio.Event()
    body = json.dumps({**LONG, "stream": True}).encode()
    incoming = iter([{"type": "http.request", "body": body}, None])  # nothing more until the first piece is there

    async def receive() -> Any:
        message = next(incoming, {"type": "http.disconnect"})
        if message is None:
            await ended.wait()
        return message

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody is there for {message['type']}")

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
    await app({**scope, "raw_path": CHAT.encode(), "root_path": "", "app": app}, receive, send)
    assert app.state.host._taken == 0
    await asyncio.to_thread(wait_until, lambda: endless.stats()["requests"] == 1)
    assert endless.stats()["output_tokens"] < LONG["max_tokens"]


def test_more_requests_than_a_server_takes_on_are_told_to_come_again(serve: Serve, endless: SemShareEngine) -> None:
    server = serve(endless, max_requests=2).wait_until_loaded()
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    asked: dict[str, Any] = {"json": {**LONG, "stream": True}, "headers": headers}
    with (
        httpx.stream("POST", f"{server.url}{CHAT}", **asked) as one,
        httpx.stream("POST", f"{server.url}{CHAT}", **asked) as other,
    ):
        lines = [response.iter_lines() for response in (one, other)]  # which close the response when they are dropped
        assert all(next(each).startswith("data: ") for each in lines)
        refused = server.post(CHAT, SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{server.url}/health").status_code == 200
    wait_until(lambda: server.num_taken == 0)
    assert server.post(CHAT, SHORT).status_code == 200


def test_while_the_model_loads_callers_are_told_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = SemShareEngine.from_pretrained("semsharekv/reference"), threading.Event()
    load = engine._load
    monkeypatch.setattr(engine, "_load", lambda: (gate.wait(60), load())[1])
    server = serve(engine, model="tiny")
    for path in ("/health", DOCUMENTS):
        assert httpx.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {KEYS[0]}"}).status_code == 503
    early = server.post(CHAT, SHORT)
    assert (early.status_code, early.json()["error"]["code"]) == (503, "model_loading")
    gate.set()
    assert server.wait_until_loaded().post(CHAT, SHORT).status_code == 200


def test_documents_are_warmed_listed_and_forgotten_within_their_tenant(serve: Serve) -> None:
    server = serve().wait_until_loaded()
    text = "The schools in Velmar open again on Monday, and the shops stay shut for two hours."
    assert server.post(DOCUMENTS, {"id": "notes/1", "text": text, "pinned": True}).json()["stored"] is True
    own, other = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    (listed,) = httpx.get(f"{server.url}{DOCUMENTS}", headers=own).json()["data"]
    assert (listed["id"], listed["pinned"], listed["entries"]) == ("notes/1", True, 1) and listed["tokens"] > 5
    assert httpx.get(f"{server.url}{DOCUMENTS}", headers=other).json()["data"] == []
    for headers, status in ((other, 404), (own, 200), (own, 404)):
        assert httpx.delete(f"{server.url}{DOCUMENTS}/notes/1", headers=headers).status_code == status
    assert httpx.get(f"{server.url}{DOCUMENTS}", headers=own).json()["data"] == []
    bad: list[tuple[dict[str, Any], str]] = [
        ({"id": "", "text": text}, "id"),
        ({"id": "a", "text": " "}, "text"),
        ({"id": "a", "text": text, "ttl_s": 0}, "ttl_s"),
        ({"id": "a"}, "text"),
    ]
    for body, field in bad:
        response = server.post(DOCUMENTS, body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_neither_logs_nor_metrics_hold_what_was_asked(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve().wait_until_loaded()
    secret = "hollyhock"
    with caplog.at_level(logging.DEBUG):
        asked = {**SHORT, "messages": [{"role": "user", "content": secret}]}
        assert server.post(CHAT, asked).status_code == 200
        assert server.post(CHAT, {**asked, "banana": secret}).status_code == 400
        assert server.post(DOCUMENTS, {"id": secret, "text": secret}).status_code == 200

        def fail(*_: object, **__: object) -> None:
            raise TypeError(secret)

        monkeypatch.setattr(server.engine, "agenerate", fail)
        broken = server.post(CHAT, asked)
    told = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"}).text
    assert broken.status_code == 500 and secret not in broken.text and "TypeError" in caplog.text
    own = [record for record in caplog.records if record.name.startswith(("semsharekv", "uvicorn", "fastapi"))]
    assert all(secret not in record.getMessage() for record in own)
    assert secret not in capfd.readouterr().err and secret not in told
    assert "semsharekv_requests_total" in told


def test_a_minute_in_small_leaks_nothing(serve: Serve, endless: SemShareEngine) -> None:
    """Callers ask and leave at random; ``SEMSHAREKV_SOAK_S`` says how long, in seconds."""
    server, draw = serve(endless, max_requests=6).wait_until_loaded(), Random(0)
    rounds = int(float(os.environ.get("SEMSHAREKV_SOAK_S", "5")) * 2)
    before = {thread.name for thread in threading.enumerate()}

    def call(seed: int) -> None:
        own = Random(seed)
        body = {**LONG, "max_tokens": own.choice((1, 5, 4000)), "stream": own.random() < 0.5}
        headers = {"Authorization": f"Bearer {own.choice(KEYS)}"}
        timeout = httpx.Timeout(60, read=own.choice((0.05, 0.2, 60.0 if body["max_tokens"] < 10 else 0.3)))
        try:
            with httpx.stream("POST", f"{server.url}{CHAT}", json=body, headers=headers, timeout=timeout) as response:
                for count, _ in enumerate(response.iter_lines()):
                    if count >= own.choice((0, 2, 50)):
                        break
        except httpx.ReadTimeout:
            pass

    for _ in range(rounds):
        callers = [threading.Thread(target=call, args=(draw.random(),)) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    wait_until(lambda: server.num_taken == 0)
    assert server.post(CHAT, SHORT).status_code == 200
    endless.store.check()
    left = {thread.name for thread in threading.enumerate()} - before
    assert len(left) <= endless.config.calls_in_flight + 2, left


def test_sigterm_lets_answers_end_and_keeps_the_store(tmp_path: Path) -> None:
    """A page that is open does not hold it up."""
    command = [sys.executable, "-m", "semsharekv_integrations", "serve", "--port", "0", "--mode", "exact"]
    options = ["--store", str(tmp_path), "--drain-s", "90"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\S+", line)))
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        asked = {
            "model": name,
            "messages": [{"role": "user", "content": "Who is the mayor of Velmar?"}],
            "max_tokens": 99,
        }
        answer = httpx.stream("POST", f"{url}{CHAT}", json={**asked, "stream": True}, timeout=60)
        with answer as response, httpx.stream("GET", f"{url}/gradio_api/heartbeat/abc", timeout=60) as page:
            lines, beats = response.iter_lines(), page.iter_lines()
            first = next(lines)
            assert page.status_code == 404 or "ALIVE" in next(beats), "where there is a page"
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
            list(beats)
        assert first.startswith("data: ") and rest[-2] == "data: [DONE]"
        process.stderr.read()
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(directory=tmp_path))
    kept = SemShareEngine.from_pretrained("semsharekv/reference", config)
    again = kept.generate(asked["messages"], namespace="served", max_new_tokens=1)
    assert again.report.prefix_tokens == again.report.prompt_tokens - 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host is '0.0.0.0'"),
        (["--host", "192.168.1.5"], "--api-key"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-requests", "0"], "max_requests is 0"),
        (["--max-body-mib", "0"], "--max-body-mib is 0"),
        (["--host", "no such host", "--api-key", "k"], "nothing can listen at host 'no such host'"),
        (["--api-key", " a"], "api_keys"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--drain-s", "-1"], "--drain-s is -1"),
        (["--cors-origin", "*"], "cors_origins is '*'"),
        (["--cors-origin", "https://a.example/"], "cors_origins is"),
        (["--allow-host", "a.example:8000"], "hosts is"),
    ],
)
def test_bad_arguments_start_no_server(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEMSHAREKV_API_KEYS", raising=False)
    assert main(["serve", "--port", "0", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["serve", "demo --web"])
def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*command.split(), "--port", str(port)]) == 2
    told = capsys.readouterr()
    assert f"nothing can listen at host '127.0.0.1' and port {port}: " in " ".join(told.err.split()) and not told.out
