"""Measure replicas: two behind Ray Serve beside one engine with the room of both, on real text.

    PYTHONPATH=. python examples/lab/measure_replicas.py --model FOLDER --out examples/lab/results/replicas.jsonl

The mix has twelve sets of XQuAD's paragraphs. Each is asked about several times; requests come in random order, and
each has the paragraphs of its set in random order. Four callers ask, each its next request once it has its answer.
Every way to serve gets the same requests. Each run is a line of ``--out``, and a later call goes on behind the lines
that are there. What is printed is the tables of ``results/replicas.md``.

``one``: one engine's server, without Ray. ``gateway``: one replica. ``content``: two, by the package's router.
``random``: two, by chance. ``killed``: as ``content``, but that a replica is killed when a third is answered; once
there are two again, as much is asked once more, in other orders.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import numpy as np

from semsharekv_integrations.lab.figures import Estimate, bootstrap
from semsharekv_integrations.lab.report import describe_origin, record_command
from semsharekv_integrations.lab.texts import Passage, ask, collect_texts, read_passages

WAYS = ("one", "gateway", "content", "random", "killed")
SETS, PER_SET, ROUNDS = 12, 4, 4
CALLERS = 4
ROOM = 512 * 1024**2  # of one engine; of the replicas together
NEW_TOKENS = 4
HEADER = "x-semsharekv-replica"
BACK_S = 180  # at most, until a replica is replaced


class Request(NamedTuple):
    """A question about a set, whose paragraphs come in their own order."""

    set: int
    messages: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """What became of a request. Times are in seconds, from the beginning of the run."""

    set: int
    began_s: float
    ended_s: float
    replica: str = ""
    first_s: float | None = None  # when the first token came; None where none did
    prompt_tokens: int = 0
    cached_tokens: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """All answers of one way to serve, in the order of requests."""

    way: str
    mode: str
    seed: int
    seconds: float
    answers: Sequence[Answer]
    killed: str = ""  # replica
    killed_s: float = 0.0
    working: int = 0  # requests that it was working on
    back_s: float | None = None  # from then until there were two again
    again: Sequence[Answer] = ()  # of another turn, when there were
    engines_cpu_s: float = 0.0  # processor time of the engines' processes
    ray_cpu_s: float = 0.0  # of all else that Ray runs
    machine_cpu_s: float = 0.0  # of everything on the machine
    origin: Mapping[str, Any] = field(default_factory=dict)


def draw_requests(
    seed: int, rounds: int = ROUNDS, turn: int = 0, passages: Sequence[Passage] | None = None
) -> list[Request]:
    """Return the requests of a mix: so many about each set. Another turn has other orders and questions."""
    passages = read_passages() if passages is None else passages
    drawn = random.Random(f"sets {seed}").sample(passages, SETS * PER_SET)
    rng, asked = random.Random(f"requests {seed} {turn}"), list[Request]()
    for number in range(SETS):
        own = drawn[number * PER_SET : (number + 1) * PER_SET]
        questions = [question.text for passage in own for question in passage.questions]
        for question in rng.sample(questions, rounds):
            texts = collect_texts(rng.sample(own, PER_SET))
            asked.append(Request(number, [dict(one) for one in ask(texts, question).prompt]))  # type: ignore[arg-type]
    return rng.sample(asked, len(asked))


def send(request: Request, url: str, model: str, began: float) -> Answer:
    """Ask, and read the answer as it comes. What fails is told, not raised."""
    body = {"model": model, "messages": request.messages, "max_tokens": NEW_TOKENS, "stream": True}
    body["stream_options"] = {"include_usage": True}
    found: dict[str, Any] = {"set": request.set, "began_s": time.monotonic() - began}
    problem = "it ended before its time"
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as answer:
            found["replica"] = answer.headers.get(HEADER, "")
            if answer.status_code != 200:
                problem = f"{answer.status_code} {answer.read().decode()[:100]}"
            for line in answer.iter_lines() if answer.status_code == 200 else ():
                told = line.removeprefix("data: ")
                if told == "[DONE]":
                    problem = ""
                elif told:
                    found.setdefault("first_s", time.monotonic() - began)
                    found |= read_usage(json.loads(told).get("usage"))
    except httpx.HTTPError as error:
        problem = type(error).__name__
    return Answer(**found, ended_s=time.monotonic() - began, problem=problem)


def read_usage(usage: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the tokens of a prompt, and those of them that were not computed; nothing if they are not told."""
    if not usage:
        return {}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {"prompt_tokens": usage["prompt_tokens"], "cached_tokens": cached}


def send_all(
    requests: Sequence[Request], send_one: Callable[[Request], Answer], watch: Callable[[Answer], object]
) -> list[Answer]:
    """Return the answers, in the order of requests. ``watch`` is told each as it comes, one at a time."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    answers: dict[int, Answer] = {}
    lock = threading.Lock()

    def call() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            answer = send_one(requests[number])
            with lock:
                answers[number] = answer
                watch(answer)

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return [answers[number] for number in range(len(requests))]


@contextmanager
def open_way(way: str, model: str, mode: str) -> Iterator[tuple[Any, list[Any]]]:
    """Serve in one of ``WAYS``; yield the module that serves, and the engines' processes."""
    import replica_servers as servers  # which needs Ray

    settings = servers.make_settings(model, mode, 1 if way in ("one", "gateway") else 2, ROOM)
    with ExitStack() as stack:
        if way == "one":
            yield servers, stack.enter_context(servers.serve_alone(settings))
        else:
            stack.enter_context(servers.begin_ray())
            yield servers, stack.enter_context(servers.serve_replicas(settings, by_chance=way == "random"))


def measure(way: str, model: str, mode: str, seed: int, rounds: int) -> Run:
    """Serve in one way, ask everything, and return what came of it."""
    import psutil

    requests = draw_requests(seed, rounds)
    with open_way(way, model, mode) as (servers, processes):
        began, busy_s = time.monotonic(), _count_busy(psutil)
        besides = [one for one in psutil.Process().children(recursive=True) if one not in processes]
        before_s, ray_before_s = _count_cpu(processes), _count_cpu(besides)
        killing = Killing(servers, began, len(requests) // 3 if way == "killed" else None)
        send_one = partial(send, url=servers.URL, model=servers.MODEL, began=began)
        answers = send_all(requests, send_one, killing.watch)
        seconds, machine_s = time.monotonic() - began, _count_busy(psutil) - busy_s
        engines_s, ray_s = _count_cpu(processes) - before_s, _count_cpu(besides) - ray_before_s
        again = []
        if way == "killed":
            killing.wait()
            again = send_all(draw_requests(seed, rounds, turn=1), send_one, lambda _: None)
    told: dict[str, Any] = {"killed": killing.name, "killed_s": killing.at_s, "working": killing.working}
    told |= {"back_s": killing.back_s, "again": again, "engines_cpu_s": engines_s, "ray_cpu_s": ray_s}
    told |= {"machine_cpu_s": machine_s, "origin": describe_origin("")}
    return Run(way, mode, seed, seconds, answers, **told)


def _count_cpu(processes: Sequence[Any]) -> float:
    """Return the processor seconds of the processes that run still."""
    return float(sum(sum(one.cpu_times()[:2]) for one in processes if one.is_running()))


def _count_busy(psutil: Any) -> float:
    """Return the seconds for which the machine's processors have worked."""
    times = psutil.cpu_times()
    return float(times.user + times.system)


class Killing:
    """Kills the replica that works on most requests, once so many are answered; None for never."""

    def __init__(self, servers: Any, began: float, after: int | None) -> None:
        self._servers, self._began, self._after = servers, began, after
        self._num_answered = 0
        self._watching: threading.Thread | None = None
        self.name, self.at_s, self.working, self.back_s = "", 0.0, 0, None

    def watch(self, _: Answer) -> None:
        """Count an answer."""
        self._num_answered += 1
        if self._num_answered == self._after:
            self._watching = threading.Thread(target=self._kill)
            self._watching.start()

    def wait(self) -> None:
        """Return when there are two again, or after ``BACK_S``."""
        if self._watching is not None:
            self._watching.join()

    def _kill(self) -> None:
        self.name, self.working = self._servers.kill_busiest()
        self.at_s = time.monotonic() - self._began
        was_less = False
        while time.monotonic() - self._began - self.at_s < BACK_S:
            number = self._servers.count_replicas()
            was_less = was_less or number < 2
            if was_less and number == 2:
                self.back_s = time.monotonic() - self._began - self.at_s
                return
            time.sleep(0.1)


def count_hits(answers: Sequence[Answer]) -> float:
    """Return the tokens that were not computed over those of the prompts, where answers came."""
    whole = [answer for answer in answers if not answer.problem]
    return sum(answer.cached_tokens for answer in whole) / sum(answer.prompt_tokens for answer in whole)


def compare_hits(own: Sequence[Run], one: Sequence[Run]) -> Estimate:
    """Return the tokens that were not computed as a share of those of one engine, on requests that both answered.

    The 95% interval is a bootstrap over document sets.
    """
    alone, counts = {run.seed: run for run in one}, Counter[tuple[int, int, str]]()
    for run in own:
        for mine, its in zip(run.answers, alone[run.seed].answers, strict=True):
            assert mine.set == its.set, "the same requests"
            if not mine.problem and not its.problem:
                counts[run.seed, mine.set, "own"] += mine.cached_tokens
                counts[run.seed, mine.set, "one"] += its.cached_tokens
    places = sorted({(seed, number) for seed, number, _ in counts})
    cached = {who: np.array([counts[seed, number, who] for seed, number in places]) for who in ("own", "one")}

    def divide(drawn: np.ndarray, axis: int | None = None) -> np.ndarray:
        chosen = drawn.astype(int)
        return cached["own"][chosen].sum(axis) / cached["one"][chosen].sum(axis)

    return bootstrap(range(len(places)), divide)


def describe_way(runs: Sequence[Run], one: Sequence[Run]) -> list[str]:
    """Return the cells of a way to serve, over all its runs."""
    answers = [answer for run in runs for answer in run.answers]
    served = [sorted(Counter(answer.replica for answer in run.answers).values()) for run in runs]
    share = "-" if runs[0].way in ("one", "gateway") else f"{sum(map(min, served)) / len(answers):.0%}"
    compared = compare_hits(runs, one)
    seconds = sum(run.seconds for run in runs)
    alone = {run.seed: run.seconds for run in one}
    timed = [run for run in runs if run.ray_cpu_s]
    return [
        runs[0].way,
        str(len(answers)),
        f"{count_hits(answers):.3f}",
        f"{compared.value:.1%} [{compared.low:.1%}, {compared.high:.1%}]",
        share,
        f"{median(answer.first_s - answer.began_s for answer in answers if answer.first_s is not None):.1f}",
        f"{len(answers) / seconds:.3f}",
        f"{sum(alone[run.seed] for run in runs) / seconds:.2f}",
        f"{sum(run.engines_cpu_s for run in runs) / len(answers):.2f}",
        f"{sum(run.engines_cpu_s for run in runs) / seconds:.2f}",
        f"{sum(run.machine_cpu_s - run.engines_cpu_s for run in runs) / seconds:.2f}",
        f"{sum(run.ray_cpu_s for run in timed) / sum(run.seconds for run in timed):.2f}" if timed else "-",
    ]


def describe_killing(run: Run) -> list[str]:
    """Return the cells of a run in which a replica was killed."""
    failed = [answer for answer in run.answers if answer.problem]
    own = [one for one in failed if one.began_s < run.killed_s < one.ended_s and one.replica in ("", run.killed)]
    back = "not within 180" if run.back_s is None else f"{run.back_s:.0f}"
    return [
        str(run.seed),
        str(len(run.answers)),
        str(run.working),
        str(len(failed)),
        str(len(failed) - len(own)),
        back,
        f"{count_hits(run.answers):.3f}",
        f"{count_hits(run.again):.3f}",
        str(sum(bool(answer.problem) for answer in run.again)),
    ]


def make_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def make_page(runs: Sequence[Run], command: str) -> str:
    """Return the page of all runs."""
    commits = sorted({str(run.origin.get("commit", "unknown"))[:12] for run in runs})
    parts = [LEGEND.format(command=command, commits=", ".join(commits), room=ROOM // 1024**2)]
    for mode in sorted({run.mode for run in runs}, reverse=True):
        of_mode = {way: [run for run in runs if (run.way, run.mode) == (way, mode)] for way in WAYS}
        whole = {way: found for way, found in of_mode.items() if found and way != "killed"}
        seeds = ", ".join(str(run.seed) for run in of_mode["one"])
        rows = [describe_way(found, of_mode["one"]) for found in whole.values()]
        parts.append(f"## Mode `{mode}`, seeds {seeds}\n\n" + make_table(TITLES, rows))
        if of_mode["killed"]:
            killings = [describe_killing(run) for run in of_mode["killed"]]
            parts.append("One replica of two killed:\n\n" + make_table(KILLED_TITLES, killings))
    return "\n\n".join(parts) + "\n"


TITLES = (
    "way",
    "n",
    "hit rate",
    "of one's [95%]",
    "the lesser replica's share",
    "first token, s",
    "requests a second",
    "times one's",
    "engines' processor s a request",
    "cores that engines had",
    "cores that all else had",
    "of these, Ray",
)
KILLED_TITLES = (
    "seed",
    "n",
    "it worked on",
    "failed",
    "of these, not its own",
    "two again after, s",
    "hit rate",
    "hit rate of the next turn",
    "failed then",
)
LEGEND = "`{command}` at commit {commits}, {room} MiB of KV in all"


def read_runs(path: Path) -> list[Run]:
    """Return the runs in a file; none if there is no such file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        told = json.loads(line)
        for name in ("answers", "again"):
            told[name] = [Answer(**answer) for answer in told[name]]
        found.append(Run(**told))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what ``--out`` lacks, and print the tables of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--mode", default="identical")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="requests about each set")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each run; continued if there")
    args = parser.parse_args(arguments)
    runs = read_runs(args.out)
    for seed in args.seeds:
        for way in args.ways:
            if not any((run.way, run.mode, run.seed) == (way, args.mode, seed) for run in runs):
                runs.append(measure(way, args.model, args.mode, seed, args.rounds))
                with args.out.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
    command = record_command("python examples/lab/measure_replicas.py", arguments)
    print(make_page(runs, command))


if __name__ == "__main__":
    main()
