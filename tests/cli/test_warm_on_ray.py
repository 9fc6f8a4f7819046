"""What a Ray cluster's workers hand over, and how many there are. Needs Ray, but none that runs.

``tests/serving/test_serving_replicas.py`` has one that runs, and warms a folder on it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from libraries import DOCUMENTS, save_model, write_documents
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.warming.computing import Computed, Computer, ModelSpec, open_computing, take_handed
from tiny_models import make_model

ray = pytest.importorskip("ray", reason="needs the extra ray")
pa = pytest.importorskip("pyarrow", reason="needs the extra ray")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    tokens = AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))
    return ModelSpec(save_model(tmp_path_factory.mktemp("model"), make_model("llama", len(tokens)), tokens), "cpu")


def test_kv_comes_back_whole_however_its_pieces_come(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semsharekv_integrations.warming import cluster

    monkeypatch.setattr(cluster, "PIECE_BYTES", 1000)
    keys, texts = [*DOCUMENTS, "long.txt"], [*DOCUMENTS.values(), "No end of it. " * 500]
    told = cluster.Worker(spec, 1)(pa.table({"key": keys, "text": texts}))
    rows = [row for table in told for row in table.to_pylist()]
    assert all(len(row["piece"]) <= 1000 for row in rows) and len(rows) > 3 * len(keys)
    incoming, here = cluster.Incoming(tmp_path), Computer(spec)
    facts, found = here.describe(), {}
    for row in random.Random(1).sample(rows, len(rows)):
        path = incoming.take(row)
        if path is not None:
            computed = Computed(row["key"], row["digest"], reason=row["reason"])
            found[row["key"]] = computed if computed.reason else take_handed(computed, path, facts)
    assert set(found) == set(keys) and "cannot be computed" in found["long.txt"].reason
    for key, path in ((key, write_documents(tmp_path / "texts") / key) for key in DOCUMENTS):
        (own,), (its,) = here.compute_one(key, path).references, found[key].references
        assert found[key].digest and list(own.token_ids) == list(its.token_ids)
        pairs = zip(own.layers, its.layers, strict=True)
        assert all(torch.equal(mine, other) for layer in pairs for mine, other in zip(*layer, strict=True))


@pytest.mark.parametrize(
    ("machines", "device", "count", "expected"),
    [
        ([{"CPU": 8, "GPU": 2}, {"CPU": 4, "GPU": 1}], None, None, (3, 0, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 4}], None, 1, (1, 0, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 4}], "cpu", None, (2, 4, 0)),
        ([{"CPU": 2}], None, None, (1, 2, 0)),
        ([{"CPU": 2}], None, 2, (2, 1, 0)),
        ([{"CPU": 2}, {}], None, 9, (2, 1, 0)),
    ],
)
def test_workers_are_as_many_as_the_cluster_has_room_for(
    machines: list[dict[str, int]],
    device: str | None,
    count: int | None,
    expected: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from semsharekv_integrations.warming.cluster import find_workers

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": each} for each in machines])
    assert find_workers(ModelSpec("m", device), count) == expected


def test_a_cluster_that_is_named_is_used_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def stop(*_: object, on_ray: bool) -> None:
        asked.append({"on_ray": on_ray})
        raise SemShareError("far enough")

    monkeypatch.setattr("semsharekv_integrations.warming.warm_folder", stop)
    for address, line in (("", []), ("auto", []), ("auto", ["--no-ray"]), ("", ["--ray"])):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert main(["warm", str(tmp_path), "--to", str(tmp_path / "kv"), *line]) == 2
    assert [each["on_ray"] for each in asked] == [False, True, False, True]


def test_the_extra_is_named_where_it_is_missing(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "semsharekv_integrations.warming.cluster", None)
    with pytest.raises(SemShareError, match=r"pip install -e .*\[ray\]"):
        open_computing(spec, None, tmp_path, on_ray=True)
