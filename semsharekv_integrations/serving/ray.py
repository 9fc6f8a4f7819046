"""Several replicas of the server behind one address, by Ray Serve.

    serve run semsharekv_integrations.serving.ray:app model=FOLDER replicas=2

Each replica is an engine with the application of ``create_app``, a GPU if there is one, and a store directory of its
own. A gateway reads a request and asks Ray for a replica; ``ContentRouter`` ranks them by what they hold. Needs the
extra ``ray``. Knows nothing about how replicas are ranked: see ``routing``.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError, StoreLockedError, is_number, is_whole, require
from semsharekv_integrations.serving.app import create_app
from semsharekv_integrations.serving.gates import Gate
from semsharekv_integrations.serving.relaying import (
    HEADER,
    PLAIN,
    Collected,
    Message,
    Relayed,
    collect,
    find_text,
    join_documents,
    join_metrics,
    run_app,
)
from semsharekv_integrations.serving.routing import NOTHING, Candidate, Holdings, Router, Sketch, mark_text
from semsharekv_integrations.serving.settings import ServerConfig
from semsharekv_integrations.store.directory import DirectoryLock
from semsharekv_integrations.store.mounting import check_libraries

SKETCH = "sketch"
DOCUMENTS, METRICS = "/v1/documents", "/metrics"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # replicas say which of them they take
NAME = "default"  # of the application, as ``serve run`` has it
WAIT_LOOP_S = 0.5  # between two looks whether answers have ended
CLOSES_S = 10.0  # at most, for stores to be closed behind the last answer


@dataclass(frozen=True)
class ReplicaSettings:
    """What every replica is made of.

    Attributes:
        model: folder or hub id.
        replicas: how many.
        mode, budget: what may be reused, as ``ReuseConfig`` takes them.
        store: folder in which each replica has a directory of its own, or None.
        max_bytes: bound on the KV in each replica's memory, as ``StoreConfig`` has it.
        libraries: folders of KV that all of them mount.
        copies: replicas that compute a document which is warmed.
        period_s: seconds between two sketches of a replica.
        device, dtype: as ``SemShareEngine.from_pretrained`` takes them.
        drain_s: seconds that answers get to end when a replica or the server stops.
        server: who may call, and how much. There is no chat page, whose visitors would change replicas.
    """

    model: str = "semsharekv/reference"
    replicas: int = 2
    mode: Any = "auto"
    budget: float | None = None
    store: str | None = None
    max_bytes: int = StoreConfig.max_bytes
    libraries: Sequence[str] = ()
    copies: int = 1
    period_s: float = 2.0
    device: str | None = None
    dtype: str = "auto"
    drain_s: float = 30.0
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        for name in ("replicas", "copies"):
            require(is_whole(getattr(self, name), 1), name, getattr(self, name), "1 or more")
        require(is_number(self.drain_s) and self.drain_s >= 0, "drain_s", self.drain_s, "0 or more seconds")
        require(is_number(self.period_s) and self.period_s > 0, "period_s", self.period_s, "seconds above 0")
        require(is_whole(self.max_bytes, 0), "max_bytes", self.max_bytes, "0 or more bytes")
        require(self.copies <= self.replicas, "copies", self.copies, f"at most {self.replicas}, the replicas")
        object.__setattr__(self, "server", replace(self.server, page=False))

    def make_engine(self, directory: Path | None) -> SemShareEngine:
        """Return one replica's engine, with a store in ``directory``; its weights are not loaded yet."""
        store = StoreConfig(self.max_bytes, directory=directory, libraries=tuple(self.libraries))
        config = EngineConfig(ReuseConfig(self.mode, budget=self.budget), store)
        return SemShareEngine.from_pretrained(self.model, config, self.device, self.dtype)


class ContentRouter(RequestRouter):
    """Asks the replicas in the order of ``Router.rank``. A request names its text, its tenant and whom to avoid."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin with nothing known; ``kwargs`` are those of ``Router``."""
        self._ranking = Router(**kwargs)
        self._sketches: dict[str, tuple[bytes, Sketch]] = {}
        self._working: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the candidates that are worth asking, one in each rank."""
        about = _read_about(pending_request)
        by_id = {one.replica_id.unique_id: one for one in candidate_replicas}
        left = {id: one for id, one in by_id.items() if id not in about["avoid"]} or by_id
        self._ranking.keep_only(by_id)
        told = [Candidate(id, self._count_queue(one), self._read_sketch(id, one)) for id, one in left.items()]
        return [[left[id]] for id in self._ranking.rank(told, mark_text(about["text"], about["tenant"]))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember what a replica was sent."""
        about = _read_about(pending_request)
        self._working[replica_id.unique_id] += 1
        self._ranking.note(replica_id.unique_id, mark_text(about["text"], about["tenant"]))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a replica has one request less."""
        self._working[replica_id.unique_id] -= 1

    def _count_queue(self, replica: RunningReplica) -> int:
        """Return the larger of what was sent from here, and what the replica told last."""
        told = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(told, self._working[replica.replica_id.unique_id])

    def _read_sketch(self, id: str, replica: RunningReplica) -> Sketch:
        """Return the replica's latest sketch; one that says nothing before the first."""
        told = (replica.routing_stats or {}).get(SKETCH)
        if not told:
            return NOTHING
        known = self._sketches.get(id)
        if known is None or known[0] != told:
            known = self._sketches[id] = told, Sketch.from_bytes(told)
            self._ranking.refresh(id)
        return known[1]


class Replica:
    """One engine, with the application that answers for it."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc] # Ray awaits it
        self._id = serve.get_replica_context().replica_id.unique_id
        self._lock, directory = _claim_directory(settings)
        self._engine = settings.make_engine(directory)
        self._app = create_app(self._engine, settings.server)
        self._holdings = Holdings()
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()
        await run_in_threadpool(lambda: self._engine.model)

    async def __del__(self) -> None:  # Ray awaits it when a replica ends in peace
        await self._life.__aexit__(None, None, None)
        if self._lock is not None:
            self._lock.release()

    def check_health(self) -> None:
        """Raise why the model could not be loaded, if so."""
        if self._app.state.host.failure is not None:
            raise self._app.state.host.failure

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return a sketch of what is stored."""
        return {SKETCH: (await run_in_threadpool(self._make_sketch)).to_bytes()}

    def _make_sketch(self) -> Sketch:
        references, tokenizer = self._engine.store.references(), self._engine.tokenizer
        self._holdings.keep_only(reference.id for reference in references)
        for reference in references:
            if reference.id not in self._holdings:
                text = tokenizer.decode(reference.token_ids, skip_special_tokens=True)
                self._holdings.put(reference.id, mark_text(str(text), reference.namespace))
        return self._holdings.sketch()

    async def answer(self, scope: Message, body: bytes, about: Mapping[str, Any]) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages that the application answers a request with. Its caller may leave at any time."""
        async with aclosing(run_app(self._app, scope, body)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (HEADER.encode(), self._id.encode())]
                yield message


def _read_about(pending: PendingRequest | None) -> Mapping[str, Any]:
    """Return what the gateway says of a request; nothing of one that it did not send."""
    nothing: Mapping[str, Any] = {"text": "", "tenant": "", "avoid": ()}
    return pending.args[2] if pending is not None and len(pending.args) == 3 else nothing


def _read_settings(args: Mapping[str, Any]) -> ReplicaSettings:
    """Return the settings of a command line, where everything is text."""
    readers: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("replicas", "copies", "max_bytes"), int),
        **dict.fromkeys(("budget", "period_s", "drain_s"), float),
        "libraries": lambda told: told.split(","),
    }
    try:
        return ReplicaSettings(**{name: readers.get(name, str)(value) for name, value in args.items()})
    except TypeError as error:
        known = ", ".join(each.name for each in fields(ReplicaSettings))
        raise ValueError(f"{error}; accepted are {known}") from error


def _claim_directory(settings: ReplicaSettings) -> tuple[DirectoryLock | None, Path | None]:
    """Return a directory of this replica's own, locked: one that an ended replica has left, if there is any."""
    if settings.store is None:
        return None, None
    number = 0
    while True:
        path = Path(settings.store).resolve() / f"replica-{number}"
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        with suppress(StoreLockedError):
            return DirectoryLock(path), path
        number += 1


class _Passed(Response):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gate(scope, receive, send)


api = FastAPI(openapi_url=None)


@serve.ingress(api)
class Gateway:
    """Reads requests, has replicas answer them, and passes the answers on."""

    def __init__(self, replicas: DeploymentHandle, settings: ReplicaSettings) -> None:
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._settings = settings
        self._gate = Gate(self._forward, settings.server)

    @api.api_route("/{path:path}", methods=METHODS)
    async def pass_on(self) -> Response:
        """Hand a request to the gate, which looks at it before its body is read."""
        return _Passed(self._gate)

    async def _forward(self, scope: Message, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        if request.url.path == DOCUMENTS and request.method == "POST":
            warmed = await self._ask_several(request, body, self._settings.copies)
            answer: Response = next((one for one in warmed if one.status_code != 200), warmed[0])
        elif request.url.path.startswith(DOCUMENTS):
            answer = join_documents(await self._ask_several(request, body, self._settings.replicas))
        elif request.url.path == METRICS:
            answer = join_metrics(await self._ask_several(request, body, self._settings.replicas))
        else:
            answer = Relayed(self._ask(request, body, ()))
        await answer(scope, receive, send)

    async def _ask_several(self, request: Request, body: bytes, count: int) -> list[Collected]:
        """Return the answers of so many replicas, fewer if there are fewer."""
        found: dict[str, Collected] = {}
        for _ in range(count):
            answer = await collect(self._ask(request, body, tuple(found)))
            if answer.replica in found:
                break
            found[answer.replica] = answer
        return list(found.values())

    async def _ask(self, request: Request, body: bytes, avoid: Sequence[str]) -> AsyncGenerator[Message, None]:
        scope = {key: request.scope[key] for key in PLAIN if key in request.scope}
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        tenant = self._settings.server.find_tenant(key) or ""
        about = {"text": find_text(body), "tenant": tenant, "avoid": list(avoid)}
        answers = self._replicas.remote(scope, body, about)
        try:
            async for message in answers:
                yield message
        finally:
            answers.cancel()


def app(args: Mapping[str, Any] | ReplicaSettings) -> serve.Application:
    """Return the application for ``serve run``, of ``ReplicaSettings`` or their fields."""
    return build_application(args if isinstance(args, ReplicaSettings) else _read_settings(args))


def build_application(settings: ReplicaSettings, router: type[RequestRouter] = ContentRouter) -> serve.Application:
    """Return the application, with another router of Ray's if one is given."""
    routing = RequestRouterConfig(request_router_class=router, request_routing_stats_period_s=settings.period_s)
    devices = 1 if settings.device is None and torch.cuda.is_available() else 0
    replica = serve.deployment(
        Replica,
        name="replica",
        num_replicas=settings.replicas,
        max_ongoing_requests=2 * settings.server.max_requests,
        request_router_config=routing,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=WAIT_LOOP_S,
        ray_actor_options={"num_cpus": 0, "num_gpus": devices},
    )
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        max_ongoing_requests=2 * settings.replicas * settings.server.max_requests,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=WAIT_LOOP_S,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(replica.bind(settings), settings)


def serve_replicas(settings: ReplicaSettings, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; replicas let their answers end, and close their stores."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the shutdown
        raise KeyboardInterrupt

    _check_model(settings)
    serve.start(http_options={"host": host, "port": port})
    signal.signal(signal.SIGTERM, stop)  # only now: Ray sets a handler of its own, which aborts
    try:
        serve.run(app(settings), blocking=True)
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        raise SemShareError(f"the replicas could not be started: {error}") from error
    finally:
        _end_answers(settings.drain_s)
        serve.shutdown()


def _end_answers(drain_s: float) -> None:
    """Take on nothing new, and return when all answers have ended and stores are closed, or it takes too long.

    ``serve.shutdown`` would end the proxy at once, and so cut the answers that pass it.
    """
    serve.delete(NAME, _blocking=False)
    end = time.monotonic() + drain_s + CLOSES_S
    while NAME in serve.status().applications and time.monotonic() < end:
        time.sleep(WAIT_LOOP_S)


def _check_model(settings: ReplicaSettings) -> None:
    """Raise what every replica would fail with, as far as that shows in configuration, tokenizer and libraries."""
    engine = settings.make_engine(None)
    check_libraries(engine.config.store)
    _ = engine.tokenizer, engine.context_window
