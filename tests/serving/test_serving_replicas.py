"""Two replicas behind one address keep what one would reuse, share the work, and outlive each other. Needs Ray."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from libraries import save_model
from running_server import KEYS, wait_until
from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.serving import ServerConfig
from semsharekv_integrations.serving.relaying import HEADER
from semsharekv_integrations.store.directory import find_directories, peek
from tiny_models import make_model

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.enable_socket
WORDS = "mayor flood bridge council crowns schools storm harbour police market tower garden winter station"
SETS, PER_SET = 12, 3
BEGINS_S = 300  # at most, for a new replica on a busy machine
OWN = {"Authorization": f"Bearer {KEYS[0]}"}


def write(seed: int) -> str:
    rng = random.Random(seed)
    return f"Report {seed}: " + " ".join(rng.choices(WORDS.split(), k=50)) + "."


def draw_prompts(rounds: int) -> list[str]:
    """Prompts about every set, each with its documents in random order."""
    rng, prompts = random.Random(7), []
    for turn in range(rounds):
        for number in rng.sample(range(SETS), SETS):
            order = rng.sample(range(number * PER_SET, (number + 1) * PER_SET), PER_SET)
            prompts.append("\n\n".join([*(write(seed) for seed in order), f"Question {turn}?"]))
    return prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokens = AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))
    made = make_model("llama", len(tokens), max_position_embeddings=4096)
    return save_model(tmp_path_factory.mktemp("model"), made, tokens)


@pytest.fixture(scope="module")
def url(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from semsharekv_integrations.serving.ray import ReplicaSettings, app

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8479})
        store = str(tmp_path_factory.mktemp("store"))
        server = ServerConfig(api_keys=KEYS, model="tiny", max_requests=64)
        of_all = {"store": store, "copies": 2, "period_s": 0.5, "device": "cpu", "server": server}
        settings = ReplicaSettings(model, 2, "identical", **of_all)
        serve.run(app(settings))
        yield "http://127.0.0.1:8479"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, prompt: str, **options: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, **options}
    return httpx.post(f"{url}/v1/completions", json=body, headers=OWN, timeout=120)


def count_cached(answer: dict[str, Any]) -> tuple[int, int]:
    usage = answer["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def test_two_replicas_reuse_what_one_would_and_share_the_work(url: str, model: str) -> None:
    prompts = draw_prompts(3)
    config = EngineConfig(reuse=ReuseConfig(mode="identical"))
    alone = SemShareEngine.from_pretrained(model, config, device="cpu", dtype=torch.float32)
    expected = sum(alone.generate(prompt, max_new_tokens=1).report.reused_tokens for prompt in prompts)
    answers = [ask(url, prompt) for prompt in prompts]
    assert [answer.status_code for answer in answers] == [200] * len(prompts)
    cached = sum(count_cached(answer.json())[0] for answer in answers)
    served = Counter(answer.headers[HEADER] for answer in answers)
    assert cached >= 0.95 * expected
    assert len(served) == 2 and min(served.values()) >= len(prompts) / 4, served


def test_a_stream_comes_in_pieces_and_errors_keep_their_shape(url: str) -> None:
    body = {"model": "tiny", "prompt": write(1), "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=OWN, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
        assert answer.headers[HEADER] and lines[-1] == "data: [DONE]" and len(lines) > 3
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
    assert ask(url, "x", n=2).status_code == 400 and ask(url, "x", model="other").status_code == 404
    assert httpx.post(f"{url}/v1/completions", content=b"{", headers=OWN, timeout=60).status_code == 400


def test_documents_are_warmed_in_several_replicas_and_forgotten_in_all(url: str) -> None:
    text = write(500)
    assert httpx.post(f"{url}/v1/documents", json={"id": "a/b", "text": text}, headers=OWN, timeout=60).json()["stored"]
    listed = httpx.get(f"{url}/v1/documents", headers=OWN, timeout=60)
    assert [one["id"] for one in listed.json()["data"] if one["id"] == "a/b"] == ["a/b"]
    assert len(listed.headers[HEADER].split(", ")) == 2
    assert httpx.delete(f"{url}/v1/documents/a/b", headers=OWN, timeout=60).status_code == 200
    assert httpx.delete(f"{url}/v1/documents/a/b", headers=OWN, timeout=60).status_code == 404


def test_a_killed_replica_costs_its_own_requests_only(url: str) -> None:
    names = Counter(ask(url, write(number)).headers[HEADER] for number in range(20))
    doomed = names.most_common(1)[0][0]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, write(1000 + number), max_tokens=40) for number in range(24)]
        ray.kill(ray.get_actor(f"SERVE_REPLICA::default#replica#{doomed}", namespace="serve"))
        answers = [one.result() for one in asked]
    lost = [answer for answer in answers if answer.status_code != 200]
    assert len(lost) <= len(answers) / 2 and all(answer.status_code >= 500 for answer in lost)
    assert all(answer.headers[HEADER] for answer in answers if answer.status_code == 200)
    wait_until(lambda: ask(url, write(3)).status_code == 200, BEGINS_S)
    new = (write(seed) for seed in itertools.count(10_000))
    wait_until(lambda: len({ask(url, next(new)).headers.get(HEADER) for _ in range(8)}) == 2, BEGINS_S)


def test_the_command_ends_in_order_at_sigterm_however_often_it_comes(tmp_path: Path) -> None:
    """Answers were given until then, and what they left is in the store."""
    line = ["serve", "--model", REFERENCE_MODEL, "--replicas", "2", "--port", "8478", "--store", str(tmp_path / "kv")]
    own = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[2])}
    own.pop("RAY_ADDRESS", None)
    server = subprocess.Popen([sys.executable, "-m", "semsharekv_integrations", *line], env=own)
    try:
        wait_until(lambda: is_healthy("http://127.0.0.1:8478"), BEGINS_S)
        body = {"model": REFERENCE_MODEL, "prompt": write(9), "max_tokens": 1}
        assert httpx.post("http://127.0.0.1:8478/v1/completions", json=body, timeout=120).status_code == 200
        server.terminate()
        time.sleep(0.2)
        server.terminate()
        assert server.wait(120) == 0
    finally:
        server.kill()
    left = [peek(path).entries for kept in (tmp_path / "kv").iterdir() for path in find_directories(kept)]
    assert sum(map(len, left)) == 1 and not list((tmp_path / "kv").rglob("*-wal"))


def test_settings_of_a_command_line_are_read_as_what_they_are() -> None:
    from semsharekv_integrations.serving.ray import ReplicaSettings, _read_settings

    told = {"model": "m", "replicas": "3", "copies": "2", "mode": "identical", "budget": "0.5", "store": "kv"}
    found = _read_settings({**told, "libraries": "a,b", "period_s": "1.5", "device": "cpu", "drain_s": "7"})
    more = {"store": "kv", "libraries": ["a", "b"], "copies": 2, "period_s": 1.5, "device": "cpu", "drain_s": 7.0}
    assert found == ReplicaSettings("m", 3, "identical", 0.5, **more)
    bad = [{"replicas": "no"}, {"drain_s": "-1"}, {"period_s": "0"}, {"copies": "3"}, {"colour": "red"}]
    for one in bad:
        with pytest.raises(ValueError, match=next(iter(one.values())) if "colour" not in one else "colour"):
            _read_settings(one)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--library", "/no/such/library"], "/no/such/library"),
        (["--port", "0"], "--port is 0"),
    ],
)
def test_what_no_replica_could_serve_is_told_before_ray_begins(
    line: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.serve.start", lambda **_: pytest.fail("Ray was begun"))
    assert main(["serve", "--replicas", "2", *line]) == 2
    told = capsys.readouterr().err
    assert named in told and "Traceback" not in told


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
