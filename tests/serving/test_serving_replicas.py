"""Two replicas behind one address keep what one would reuse, share the work, and outlive each other. Needs Ray.

The same Ray computes a library.
"""

from __future__ import annotations

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
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from libraries import DOCUMENTS, answer, open_engine, save_model, warm, write_documents
from running_server import KEYS, wait_until
from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.serving import ServerConfig
from semsharekv_integrations.serving.relaying import HEADER
from semsharekv_integrations.store.directory import find_directories, peek
from semsharekv_integrations.store.library import read_manifest
from tiny_models import make_model

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.enable_socket
WORDS = "mayor flood bridge council crowns schools storm harbour police market tower garden winter station"
SETS, PER_SET = 12, 3
LONG = 400  # tokens of an answer that goes on meanwhile
PORT, REPLICA = 8479, "ray::ServeReplica:default:replica"
URL = f"http://127.0.0.1:{PORT}"
ADDRESS = "address of the Ray that serves"
SERVE = """
from pathlib import Path

import ray
from semsharekv_integrations.serving import ServerConfig
from semsharekv_integrations.serving.ray import ReplicaSettings, serve_replicas

ray.init("local", num_cpus=2, include_dashboard=False)
Path({address!r}).write_text(ray.get_runtime_context().gcs_address)
server = ServerConfig(api_keys={keys!r}, model="tiny", max_requests=64)
more = dict(store={store!r}, copies=2, period_s=0.5, device="cpu", drain_s=120, server=server)
serve_replicas(ReplicaSettings({model!r}, 2, "identical", **more), "127.0.0.1", {port})
"""
BEGINS_S = 300  # at most, for a new replica on a busy machine
OWN = {"Authorization": f"Bearer {KEYS[0]}"}
JSON = {"Content-Type": "application/json"}


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
    made.config.eos_token_id = made.generation_config.eos_token_id = None  # answers are as long as they may be
    return save_model(tmp_path_factory.mktemp("model"), made, tokens)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(model: str, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What serves two replicas, as the command does, in a Ray of its own."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    own = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    own |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_worker_niceness": "0"}
    own.pop("RAY_ADDRESS", None)
    address = str(store.with_name(ADDRESS))
    code = SERVE.format(model=model, store=str(store), keys=KEYS, port=PORT, address=address)
    serving = subprocess.Popen([sys.executable, "-c", code], env=own)
    try:
        wait_until(lambda: serving.poll() is not None or is_healthy(URL), BEGINS_S)
        assert serving.poll() is None, "it serves"
        yield serving
    finally:
        serving.terminate()
        try:
            serving.wait(BEGINS_S)
        finally:
            serving.kill()


@pytest.fixture
def url(server: subprocess.Popen[bytes]) -> str:
    assert server.poll() is None
    return URL


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
    cut = httpx.post(f"{url}/v1/completions", content=b"{", headers=OWN | JSON, timeout=60)
    assert (cut.status_code, cut.json()["error"]["param"]) == (400, "body")
    put = httpx.put(f"{url}/v1/models", headers=OWN, timeout=60)
    assert (put.status_code, put.headers["allow"], put.json()["error"]["code"]) == (405, "GET", "method_not_allowed")


def test_documents_are_warmed_in_several_replicas_and_forgotten_in_all(url: str) -> None:
    text = write(500)
    assert httpx.post(f"{url}/v1/documents", json={"id": "a/b", "text": text}, headers=OWN, timeout=60).json()["stored"]
    listed = httpx.get(f"{url}/v1/documents", headers=OWN, timeout=60)
    assert [one["id"] for one in listed.json()["data"] if one["id"] == "a/b"] == ["a/b"]
    assert len(listed.headers[HEADER].split(", ")) == 2
    assert httpx.delete(f"{url}/v1/documents/a/b", headers=OWN, timeout=60).status_code == 200
    assert httpx.delete(f"{url}/v1/documents/a/b", headers=OWN, timeout=60).status_code == 404


def read_metrics(url: str) -> dict[str, float]:
    """The requests that each replica counts."""
    told = httpx.get(f"{url}/metrics", headers=OWN, timeout=60)
    samples = [one for family in text_string_to_metric_families(told.text) for one in family.samples]
    counts = {one.labels["replica"]: one.value for one in samples if one.name == "semsharekv_requests_total"}
    assert told.headers[HEADER].split(", ") == list(counts)
    return counts


def test_metrics_are_those_of_all_replicas(url: str) -> None:
    before = read_metrics(url)
    served = Counter(ask(url, write(600 + number)).headers[HEADER] for number in range(4))
    assert len(before) == 2 and read_metrics(url) == {name: count + served[name] for name, count in before.items()}


def test_a_folder_is_warmed_by_the_workers_of_a_cluster(
    url: str, model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find nothing of it on their disks, and need not."""
    documents = write_documents(tmp_path / "documents", {**DOCUMENTS, "long.txt": "No end of it. " * 5000})
    warm(model, documents, tmp_path / "here")
    monkeypatch.setenv("RAY_ADDRESS", store.with_name(ADDRESS).read_text())
    line = ["warm", str(documents), "--model", model, "--device", "cpu", "--to", str(tmp_path / "kv")]
    assert main([*line, "--workers", "2"]) == 1, "one document is too long"
    assert set(read_manifest(tmp_path / "kv").documents) == set(DOCUMENTS)
    engines = [open_engine(model, "identical", libraries=[tmp_path / name]) for name in ("kv", "here")]
    assert answer(engines[0]) == answer(engines[1])
    assert {path.name for path in (tmp_path / "kv").iterdir()} == {path.name for path in (tmp_path / "here").iterdir()}


def test_a_killed_replica_costs_its_own_requests_only(url: str, server: subprocess.Popen[bytes]) -> None:
    before = read_metrics(url).keys()
    begun = psutil.Process(server.pid).children(recursive=True)
    doomed = next(one for one in begun if "".join(one.cmdline()).startswith(REPLICA))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, write(1000 + number), max_tokens=40) for number in range(24)]
        doomed.kill()
        answers = [one.result() for one in asked]
    lost = [answer for answer in answers if answer.status_code != 200]
    assert len(lost) <= len(answers) / 2 and all(answer.status_code >= 500 for answer in lost)
    assert all(answer.headers[HEADER] for answer in answers if answer.status_code == 200)
    wait_until(lambda: len(read_metrics(url)) == 2, BEGINS_S)
    assert len(before & read_metrics(url).keys()) == 1, "the other one lives, and another has come"


def test_sigterm_lets_answers_end_and_closes_stores_however_often_it_comes(
    url: str, server: subprocess.Popen[bytes], store: Path
) -> None:
    body = {"model": "tiny", "prompt": write(9), "max_tokens": LONG, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=OWN, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.terminate()
        time.sleep(0.2)
        server.terminate()
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]" and len(told) > LONG / 2
    assert server.wait(120) == 0
    left = [peek(path).entries for kept in store.iterdir() for path in find_directories(kept)]
    assert len(left) >= 2 and all(left) and not list(store.rglob("*-wal"))


def test_the_command_line_is_handed_to_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    from semsharekv_integrations.serving import ray as replicas

    found: list[Any] = []
    monkeypatch.setattr(replicas, "serve_replicas", lambda *given: found.append(given))
    line = ["--model", "m", "--replicas", "3", "--mode", "identical", "--budget", "0.5", "--store", "kv"]
    line += ["--library", "a", "--library", "b", "--device", "cpu", "--dtype", "float32", "--drain-s", "7"]
    assert main(["serve", *line, "--port", "8477", "--api-key", "k"]) == 0
    more = {"store": "kv", "libraries": ("a", "b"), "device": "cpu", "dtype": "float32", "drain_s": 7}
    config = ServerConfig(api_keys=("k",))
    settings = replicas.ReplicaSettings("m", 3, "identical", 0.5, server=config, **more)
    assert found == [(settings, "127.0.0.1", 8477)]


def test_settings_of_a_command_line_are_read_as_what_they_are() -> None:
    from semsharekv_integrations.serving.ray import ReplicaSettings, _read_settings

    told = {"model": "m", "replicas": "3", "copies": "2", "mode": "identical", "budget": "0.5", "store": "kv"}
    told |= {"max_bytes": "9", "libraries": "a,b", "period_s": "1.5", "device": "cpu", "drain_s": "7"}
    more = {"store": "kv", "libraries": ["a", "b"], "copies": 2, "period_s": 1.5, "device": "cpu", "drain_s": 7.0}
    assert _read_settings(told) == ReplicaSettings("m", 3, "identical", 0.5, max_bytes=9, **more)
    bad = [{"replicas": "no"}, {"drain_s": "-1"}, {"period_s": "0"}, {"copies": "3"}, {"colour": "red"}]
    bad.append({"max_bytes": "-1"})
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
