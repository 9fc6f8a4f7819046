"""``semsharekv serve``: an OpenAI-compatible endpoint for one local model.

    semsharekv serve --model FOLDER
    semsharekv serve --model FOLDER --host 0.0.0.0 --api-key KEY --store DIR

Front ends and SDKs reach it at http://HOST:PORT/v1; at http://HOST:PORT is a chat page, if the extra web is installed.
Keys can also stand in SEMSHAREKV_API_KEYS, separated by commas: a command line can be seen by others on this machine.
Each key is a tenant of its own. SIGTERM lets answers end, takes on no new ones, and closes the store.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.terminal import add_engine_arguments, make_engine, require_address

if TYPE_CHECKING:
    from semsharekv_integrations.serving.settings import ServerConfig

KEYS = "SEMSHAREKV_API_KEYS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``semsharekv serve``, and this module's text for its help."""
    parser.description = __doc__
    add_engine_arguments(parser)
    parser.add_argument("--store", metavar="DIR", help="where KV is kept beyond this process (default: nowhere)")
    mounted = "a folder of KV that semsharekv warm made, for all callers; can be given again"
    parser.add_argument("--library", action="append", default=[], metavar="DIR", help=mounted)
    several = "engines behind the address, by Ray Serve, each with a GPU if there is one (default: 1)"
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help=several)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000); 0 for a free one")
    key = f"a key that lets a caller in; can be given again; also from {KEYS}"
    parser.add_argument("--api-key", action="append", default=[], metavar="K", help=key)
    origin = "a page of this origin may call, such as https://chat.example.org; can be given again"
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help=origin)
    named = "a name that callers without a key reach the server by; can be given again"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=named)
    parser.add_argument("--served-name", metavar="NAME", help="what the model is called (default: as --model says)")
    most = "most tokens of an answer, also where a request names none (default: what the context window leaves)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=most)
    line = "most requests that are answered or wait; more are refused (default: 32)"
    parser.add_argument("--max-requests", type=int, default=32, metavar="N", help=line)
    parser.add_argument("--max-body-mib", type=int, default=16, metavar="N", help="most MiB of a request (default: 16)")
    parser.add_argument("--no-page", action="store_true", help="no chat page, only the API")
    drain = "seconds that answers get to end behind SIGTERM or Ctrl-C (default: 30)"
    parser.add_argument("--drain-s", type=int, default=30, metavar="S", help=drain)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; return 0. Raises what the model could not be loaded for."""
    try:
        from semsharekv_integrations.serving import ServerConfig, create_app
        from semsharekv_integrations.serving.app import has_page
        from semsharekv_integrations.serving.running import Server
        from semsharekv_integrations.serving.settings import is_local
    except ImportError as error:
        missing = f'serving needs {error.name}: pip install -e ".[serve]"'
        raise SemShareError(missing) from error
    require(0 <= args.port < 2**16, "--port", args.port, "0 to 65535")
    require(args.max_body_mib >= 1, "--max-body-mib", args.max_body_mib, "1 or more")
    require(args.drain_s >= 0, "--drain-s", args.drain_s, "0 or more seconds")
    config = _read_config(args, ServerConfig)
    guarded = bool(config.api_keys) or is_local(args.host)
    require(guarded, "--host", args.host, f"an address of this machine alone, or --api-key or {KEYS} beside it")
    require(args.replicas >= 1, "--replicas", args.replicas, "1 or more")
    if args.replicas > 1:
        return _serve_replicas(args, config)
    require_address(args.host, args.port)
    server: Server

    def stop() -> None:
        server.should_exit = True

    app = create_app(make_engine(args, report_origins=config.page and has_page()), config, stop)
    server = Server(app, args.host, args.port, args.drain_s)
    server.run()
    if app.state.host.failure is not None:
        raise app.state.host.failure
    return 0


def _serve_replicas(args: argparse.Namespace, config: ServerConfig) -> int:
    require(args.port > 0, "--port", args.port, "1 to 65535 with --replicas")
    try:
        from semsharekv_integrations.serving.ray import ReplicaSettings, serve_replicas
    except ImportError as error:
        raise SemShareError(f'several replicas need {error.name}: pip install -e ".[ray]"') from error
    of_all = {"store": args.store, "libraries": tuple(args.library), "device": args.device, "dtype": args.dtype}
    of_all |= {"drain_s": args.drain_s}
    settings = ReplicaSettings(args.model, args.replicas, args.mode, args.budget, server=config, **of_all)
    serve_replicas(settings, args.host, args.port)
    return 0


def _read_config(args: argparse.Namespace, make: type[ServerConfig]) -> ServerConfig:
    hidden = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    return make(
        model=args.served_name,
        api_keys=tuple(dict.fromkeys([*args.api_key, *hidden])),
        hosts=tuple(args.allow_host),
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=args.max_body_mib * 1024**2,
        max_requests=args.max_requests,
        max_tokens=args.max_tokens,
        page=not args.no_page,
    )
