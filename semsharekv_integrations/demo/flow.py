"""The demo's calls: each is made with reuse, and as a full prefill of the same prompt beside it.

Both are run several times for their times. A repeated run has a namespace of its own, which has seen what the first
run's had seen, so that it finds as much to reuse. In modes that reuse KV off the prefix the articles come in another
order at each call of chain and query engine, and in mode ``semantic`` also reworded, where they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from typing import Any

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.demo.articles import Question, Script
from semsharekv_integrations.demo.parts import PARTS, Ask, Asked, Part
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.report import ReuseReport

_COUNTS = ("prompt_tokens", "prefix_tokens", "identical_tokens", "fuzzy_tokens", "recomputed_tokens", "ttft_s")
_WARM_UP_CHARACTERS = 400  # of an article; enough to be reused in another place


@dataclass(frozen=True)
class Call:
    """One call of the demo, with reuse and beside it in full.

    Attributes:
        scenario: which part of the demo.
        question: what was asked.
        answer: what the model said.
        right: whether that is a right answer.
        same_as_off: whether a full prefill of the same prompt gave the same text.
        report: the reuse report of the first run.
        ttft_s: seconds to the first token with reuse, the median of all runs.
        off_ttft_s: likewise with a full prefill.
    """

    scenario: str
    question: str
    answer: str
    right: bool
    same_as_off: bool
    report: dict[str, Any]
    ttft_s: float
    off_ttft_s: float

    @property
    def speedup(self) -> float:
        """Time to first token of a full prefill over that with reuse."""
        return self.off_ttft_s / self.ttft_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**asdict(self), "speedup": self.speedup}


class Demo:
    """Makes the calls of a script on one engine.

    Args:
        engine: loaded or not; a second engine in mode ``off`` shares its weights.
        script: what is read and asked.
        runs: how often each call is timed, at least 1.
        seed: of the order of the articles.
        tell: is given each call's part and answer when there is one, before the runs that only take its times.
    """

    def __init__(
        self,
        engine: SemShareEngine,
        script: Script,
        runs: int = 3,
        seed: int = 7,
        tell: Callable[[str, str], object] = lambda _part, _answer: None,
    ) -> None:
        off = SemShareEngine(engine.model, engine.tokenizer, EngineConfig(reuse=ReuseConfig(mode="off")))
        self._reusing, self._full = _Timed(engine), _Timed(off)
        self._script = script
        self._runs = runs
        self._tell = tell
        self._mode = engine.mode
        self._rng = Random(seed)

    def warm_up(self) -> None:
        """Take every path once on a little text, so that no time holds one-time costs."""
        few = {name: text[:_WARM_UP_CHARACTERS] for name, text in list(self._script.articles.items())[:2]}
        for articles in (few, dict(reversed(few.items()))):
            asked = Asked("What happened?", articles, (), 2)
            for timed in (self._reusing, self._full):
                timed.answer(PARTS["chain"].make(timed.engine, "demo warm-up"), asked)

    def run(self) -> Iterator[Call]:
        """Every call as it is done."""
        for name, part in PARTS.items():
            askers = [part.make(self._reusing.engine, f"demo {run}") for run in range(self._runs)]
            in_full = part.make(self._full.engine, "demo")
            history: list[tuple[str, str]] = []
            for number, question in enumerate(self._script.questions[name]):
                articles = self._articles(number, part)
                asked = Asked(question.text, articles, tuple(history), self._script.answer_tokens)
                call = self._call(part, question, asked, askers, in_full)
                if part.is_chat:
                    history.append((question.text, call.answer))
                yield call

    def _call(self, part: Part, question: Question, asked: Asked, askers: list[Ask], in_full: Ask) -> Call:
        """One call in all its runs; repeated ones say a word only, unless a later turn continues what they say."""
        again = asked if part.is_chat else asked._replace(max_tokens=1)
        answer, report = self._reusing.answer(askers[0], asked)
        self._tell(part.title, answer)
        full_answer, full_report = self._full.answer(in_full, asked)
        seconds, full_seconds = [report["ttft_s"]], [full_report["ttft_s"]]
        for ask in askers[1:]:
            seconds.append(self._reusing.answer(ask, again)[1]["ttft_s"])
            full_seconds.append(self._full.answer(in_full, asked._replace(max_tokens=1))[1]["ttft_s"])
        return Call(
            scenario=part.title,
            question=question.text,
            answer=answer,
            right=self._script.is_right(answer, question.expected),
            same_as_off=answer == full_answer,
            report=report,
            ttft_s=median(seconds),
            off_ttft_s=median(full_seconds),
        )

    def _articles(self, number: int, part: Part) -> Mapping[str, str]:
        """The articles as a call gets them, with the same facts; the first of each part as they are."""
        articles = self._script.articles
        if number == 0 or part.is_chat or self._mode in ("off", "exact"):
            return articles
        reword = self._script.reword if self._mode == "semantic" else None
        names = self._rng.sample(list(articles), len(articles))
        return {name: reword(self._rng, articles[name]) if reword else articles[name] for name in names}


class _Timed:
    """An engine that tells, for every answer, the report of the calls that made it."""

    def __init__(self, engine: SemShareEngine) -> None:
        self.engine = engine
        self._reports: list[ReuseReport] = []
        engine.observe(self._reports.append)

    def answer(self, ask: Ask, asked: Asked) -> tuple[str, dict[str, Any]]:
        """The answer, and its report; of several calls the last one's, with the counts and seconds of all."""
        self._reports.clear()
        answer = ask(asked).strip()
        reports = [report.to_dict() for report in self._reports]
        return answer, {**reports[-1], **{name: sum(report[name] for report in reports) for name in _COUNTS}}
