"""A server's tenants all read its libraries, see what is in them, and cannot delete it."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libraries import DOCUMENTS, open_engine, save_model, warm, write_documents
from running_server import KEYS, Serve
from semsharekv_integrations.cli import serve as command
from semsharekv_integrations.cli.main import _make_parser, main
from semsharekv_integrations.terminal import make_engine

pytestmark = pytest.mark.enable_socket


def test_every_tenant_sees_a_library_and_none_deletes_it(
    serve: Serve, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", llama, tokenizer)
    warm(model, write_documents(tmp_path / "documents"), tmp_path / "kv")
    server = serve(open_engine(model, libraries=[tmp_path / "kv"])).wait_until_loaded()
    first, second = (httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}) for key in KEYS)
    own = {"id": "own", "text": "The mayor of Velmar opened the fair on Monday."}
    assert first.post("/v1/documents", json=own).json()["stored"]
    for client, names in ((first, {"own"}), (second, set())):
        found = client.get("/v1/documents").json()["data"]
        assert {one["id"] for one in found if not one["library"]} == names
        assert {one["id"] for one in found if one["library"]} == set(DOCUMENTS)
        refused = client.delete("/v1/documents/deep/down/vote.txt")
        assert refused.status_code == 409 and "is in a library" in refused.json()["error"]["message"]
        body = {"model": "tiny", "prompt": DOCUMENTS["flood.txt"] + "\n\nWhen?", "max_tokens": 1}
        done = client.post("/v1/completions", json=body).json()
        assert done["usage"]["prompt_tokens_details"]["cached_tokens"] > 10
    assert first.delete("/v1/documents/own").status_code == 200


def test_the_command_takes_libraries(tmp_path: Path) -> None:
    args = _make_parser().parse_args(["serve", "--library", "one", "--library", str(tmp_path)])
    assert args.run is command.run
    assert make_engine(args).config.store.libraries == ("one", str(tmp_path))


def test_several_replicas_need_ray(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "semsharekv_integrations.serving.ray", raising=False)
    assert main(["serve", "--replicas", "2"]) == 2
    assert '".[ray]"' in capsys.readouterr().err
    assert main(["serve", "--replicas", "0"]) == 2
    assert "--replicas is 0; accepted is 1 or more" in capsys.readouterr().err
