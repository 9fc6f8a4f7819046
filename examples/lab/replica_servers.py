"""What ``measure_replicas`` asks: one engine's server, or replicas behind Ray Serve's gateway. Needs Ray.

Replicas import this module, for the router by chance.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.serving import ServerConfig, create_app
from semsharekv_integrations.serving.ray import ContentRouter, ReplicaSettings, build_application
from semsharekv_integrations.serving.running import Server

PORT = 8461
URL = f"http://127.0.0.1:{PORT}"
MODEL = "lab"
REPLICA = "ray::ServeReplica:default:replica"  # what Ray calls the process of one
STARTS_S = 300  # at most


class RandomRouter(RequestRouter):
    """Asks any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the candidates in random order, one in each rank."""
        return [[one] for one in random.sample(candidate_replicas, len(candidate_replicas))]


@contextmanager
def serve_alone(settings: ReplicaSettings) -> Iterator[list[psutil.Process]]:
    """Serve one engine with the room of all replicas, as ``semsharekv serve`` does; yield its process."""
    room = settings.replicas * settings.max_bytes
    told = [sys.executable, __file__, settings.model, settings.mode, str(room)]
    server = subprocess.Popen(told, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        _wait_until_served()
        yield [psutil.Process(server.pid)]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def begin_ray() -> Iterator[None]:
    """Begin a Ray of this machine, with one thread for each engine and this folder's modules."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}  # else all other work comes first
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def serve_replicas(settings: ReplicaSettings, *, by_chance: bool = False) -> Iterator[list[psutil.Process]]:
    """Serve replicas; yield their processes."""
    serve.run(build_application(settings, RandomRouter if by_chance else ContentRouter))
    try:
        _wait_until_served()
        yield find_processes()
    finally:
        serve.delete("default")


def find_processes() -> list[psutil.Process]:
    """Return the processes of the replicas, which this one's Ray began."""
    return [one for one in psutil.Process().children(recursive=True) if "".join(one.cmdline()).startswith(REPLICA)]


def count_replicas() -> int:
    """Return how many replicas answer."""
    states = serve.status().applications["default"].deployments["replica"].replica_states
    return int(states.get("RUNNING", 0))


def kill_busiest() -> tuple[str, int]:
    """End the process of the replica that works on most requests, once there are any; return its name and how many."""
    while True:
        actors = {one: ray.get_actor(one, namespace="serve") for one in _list_actors()}
        counts = ray.get([one.get_num_ongoing_requests.remote() for one in actors.values()])
        working = dict(zip(actors, counts, strict=True))
        busiest = max(working, key=working.__getitem__)
        if working[busiest]:
            ray.kill(actors[busiest])
            return busiest.rpartition("#")[2], working[busiest]


def _list_actors() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if one["name"].startswith("SERVE_REPLICA::default#replica#")]


def make_settings(model: str, mode: Any, replicas: int, room: int) -> ReplicaSettings:
    """Return the settings of so many replicas, which share the room."""
    server = ServerConfig(model=MODEL, page=False)
    sizes = {"max_bytes": room // replicas, "device": "cpu", "dtype": "float32"}
    return ReplicaSettings(model, replicas, mode, server=server, **sizes)


def _wait_until_served() -> None:
    end = time.monotonic() + STARTS_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{URL}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"nothing answers at {URL}")


def _serve_one(model: str, mode: Any, room: str) -> None:
    config = EngineConfig(ReuseConfig(mode), StoreConfig(int(room)))
    engine = SemShareEngine.from_pretrained(model, config, "cpu", "float32")
    Server(create_app(engine, ServerConfig(model=MODEL, page=False)), port=PORT).run()


if __name__ == "__main__":
    _serve_one(*sys.argv[1:])
