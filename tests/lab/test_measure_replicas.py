"""What the lab draws for replicas, and what it says of answers that were recorded."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import measure_replicas
from measure_replicas import PER_SET, SETS, Answer, Request, Run, compare_hits, count_hits, draw_requests, send

TOKENS = 100


def record(way: str, cached: Callable[[int], int], seed: int = 0) -> Run:
    """A run of two rounds about all sets, in which the second round reused what ``cached`` says of its set."""
    replicas = {"one": [""], "gateway": ["a"]}.get(way, ["a", "b"])
    answers = [
        Answer(number % SETS, number, number + 2, replicas[number % len(replicas)], number + 1.5, TOKENS, reused)
        for number in range(2 * SETS)
        for reused in [cached(number % SETS) if number >= SETS else 0]
    ]
    return Run(way, "identical", seed, 2.0 * SETS, answers, engines_cpu_s=12.0, machine_cpu_s=18.0)


def tell(run: Run) -> str:
    return json.dumps(asdict(run))


def test_a_mix_asks_about_every_set_alike_in_other_orders() -> None:
    drawn = draw_requests(3)
    assert drawn == draw_requests(3) != draw_requests(4)
    assert Counter(request.set for request in drawn) == dict.fromkeys(range(SETS), measure_replicas.ROUNDS)
    texts = {number: set[frozenset[str]]() for number in range(SETS)}
    for turn in (0, 1):
        for request in draw_requests(3, turn=turn):
            *paragraphs, _ = request.messages[1]["content"].split("\n\n")
            texts[request.set].add(frozenset(paragraphs))
    assert all(len(found) == 1 and len(*found) == PER_SET for found in texts.values()), "each set has its own"
    assert len({text for (found,) in texts.values() for text in found}) == SETS * PER_SET
    assert len({request.messages[1]["content"] for request in drawn}) == len(drawn)


def test_hits_are_compared_with_those_of_one_engine() -> None:
    one, half = record("one", lambda _: 80), record("random", lambda number: 80 * (number % 2))
    assert count_hits(one.answers) == pytest.approx(0.4) == 2 * count_hits(half.answers)
    assert compare_hits([one], [one]) == (1.0, 1.0, 1.0)
    found = compare_hits([half], [one])
    assert found.value == 0.5 and 0 < found.low < 0.5 < found.high < 1
    lost = [replace(answer, problem="500", cached_tokens=0) for answer in half.answers[::2]]
    kept = replace(half, answers=[each for pair in zip(lost, half.answers[1::2], strict=True) for each in pair])
    assert compare_hits([kept], [one]).value == 1.0, "what failed is compared with nothing"


def test_a_killed_replica_is_charged_with_its_own_requests_alone() -> None:
    whole = record("killed", lambda _: 80)
    answers = list(whole.answers)
    for place, name in ((13, "a"), (14, "b"), (20, "")):  # its own, the other's, and one that began later
        answers[place] = replace(answers[place], replica=name, problem="500")
    killed = replace(whole, answers=answers, killed="a", killed_s=14.5, working=1, back_s=9.0, again=whole.answers)
    cells = measure_replicas.describe_killing(killed)
    assert cells[:6] == ["0", str(2 * SETS), "1", "3", "2", "9"]


def test_the_page_is_made_of_the_lines_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"one": 80, "content": 76, "random": 40}
    runs = [record(way, lambda _, cached=cached: cached) for way, cached in ways.items()]
    runs.append(replace(runs[1], way="killed", killed="a", again=runs[1].answers))
    path = tmp_path / "replicas.jsonl"
    path.write_text("".join(f"{tell(run)}\n" for run in runs))
    assert list(map(tell, measure_replicas.read_runs(path))) == list(map(tell, runs))
    named = ["--ways", *(run.way for run in runs), "--seeds", "0"]
    measure_replicas.main(["--model", "none that could be loaded", *named, "--out", str(path)])
    told = capsys.readouterr().out
    rows = {line.split(" | ")[0]: line for line in told.splitlines() if line.startswith("| ")}
    assert "| 0.380 | 95.0% [95.0%, 95.0%] | 50% | 1.5 |" in rows["| content"]
    assert "50.0%" in rows["| random"] and "100.0%" in rows["| one"]


class _Speaker(BaseHTTPRequestHandler):
    """Answers the first request, breaks off at the second, and refuses the third."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        number = self.server.num_asked = getattr(self.server, "num_asked", -1) + 1
        self.send_response(500 if number == 2 else 200)
        self.send_header(measure_replicas.HEADER, "a")
        self.end_headers()
        usage = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
        for told in ({"usage": None}, {"usage": usage})[: 2 - number]:
            self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n" if number == 0 else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.enable_socket
def test_an_answer_is_read_to_its_end_and_what_fails_is_told() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Speaker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = Request(4, [{"role": "user", "content": "x"}])
    answers = [send(asked, f"http://127.0.0.1:{server.server_port}", "m", 0.0) for _ in range(3)]
    server.shutdown()
    server.server_close()
    assert (answers[0].prompt_tokens, answers[0].cached_tokens, answers[0].problem) == (7, 3, "")
    assert answers[0].first_s is not None and answers[0].first_s <= answers[0].ended_s and answers[0].replica == "a"
    assert answers[1].problem and answers[1].first_s is not None
    assert answers[2].problem.startswith("500") and answers[2].first_s is None
