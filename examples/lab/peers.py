"""Time the frameworks' own local classes beside this package's policies, on the same model.

    PYTHONPATH=. python examples/lab/peers.py --lengths 512 2048 --scenarios next_turn reordered --out peers.md

Takes what ``lengths.py`` takes. A peer reuses nothing and is timed around a call for a single token. Those that
are not installed (langchain-huggingface, llama-index-llms-huggingface) are named and left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from transformers import pipeline

import lengths
from semsharekv_integrations import EngineConfig, Generation, ReuseConfig
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.lab.bench import Bench, Study
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.report import ReuseReport
from semsharekv_integrations.world import Message

Prompt = str | list[Message]


class PeerError(SemShareError):
    """A framework's own class could not be built or did not answer; the message says which and why."""


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of a framework's own class, whatever they are, as ones that are about it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, OSError, RuntimeError) as error:
        raise PeerError(f"{name}: {type(error).__name__}: {error}") from error


class Peer:
    """A framework's own class where the bench expects an engine that stores nothing.

    Args:
        name: of the class.
        call: takes the prompt and gives a token.
    """

    config = EngineConfig(reuse=ReuseConfig(mode="off"))

    def __init__(self, name: str, call: Callable[[Prompt], object]) -> None:
        self._name = name
        self._call = call

    def generate(self, prompt: Prompt, **options: object) -> Generation:
        """One call for one token: the whole of it is the time to first token."""
        with _naming(self._name):
            began = time.perf_counter()
            said = self._call(prompt)
            seconds = time.perf_counter() - began
        return Generation(str(said), [], "length", ReuseReport("off", prompt_tokens=0, ttft_s=seconds))

    def clear(self) -> None:
        """Nothing is stored."""


def make_peers(subject: Subject) -> Mapping[str, Callable[[], Peer]]:
    """How to make each framework's own class; a maker raises ``PeerError`` if that is not installed."""
    return {
        "HuggingFacePipeline": partial(_make_pipeline, subject, chat=False),
        "ChatHuggingFace": partial(_make_pipeline, subject, chat=True),
        "HuggingFaceLLM": partial(_make_llama_index, subject),
    }


def _make_pipeline(subject: Subject, *, chat: bool) -> Peer:
    """LangChain's text pipeline on the rendered prompt, or its chat model on the messages."""
    classes = _import("langchain_huggingface", "langchain-huggingface")
    with _naming("ChatHuggingFace" if chat else "HuggingFacePipeline"):
        pipe = pipeline("text-generation", model=subject.model, tokenizer=subject.tokenizer, max_new_tokens=1)
        llm = classes.HuggingFacePipeline(pipeline=pipe)
        if not chat:
            return Peer("HuggingFacePipeline", lambda prompt: llm.invoke(_render(subject, prompt)))
        model = classes.ChatHuggingFace(llm=llm, tokenizer=subject.tokenizer, model_id=subject.name)
    return Peer("ChatHuggingFace", lambda prompt: model.invoke(_convert(prompt)))


def _make_llama_index(subject: Subject) -> Peer:
    """LlamaIndex's local class on the rendered prompt."""
    classes = _import("llama_index.llms.huggingface", "llama-index-llms-huggingface")
    window = getattr(subject.model.config, "max_position_embeddings", 2**20)
    with _naming("HuggingFaceLLM"):
        llm = classes.HuggingFaceLLM(
            model=subject.model,
            tokenizer=subject.tokenizer,
            max_new_tokens=1,
            context_window=window,
            generate_kwargs={"do_sample": False},
        )
    return Peer("HuggingFaceLLM", lambda prompt: llm.complete(_render(subject, prompt), formatted=True))


def _import(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise PeerError(f"not installed: {distribution} ({error})") from error


def _convert(prompt: Prompt) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("user", prompt)]
    return [(message["role"], message["content"]) for message in prompt]


def _render(subject: Subject, prompt: Prompt) -> str:
    """The prompt as a chain would hand it over: rendered by the chat template."""
    if isinstance(prompt, str):
        return prompt
    return str(subject.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


class PeerBench(Bench):
    """The bench with the peers among its engines."""

    def __init__(self, subject: Subject, study: Study) -> None:
        super().__init__(subject, study)
        for name, make in make_peers(subject).items():
            try:
                peer = make()
                peer.generate("Warm up.")
            except SemShareError as error:
                self.missing[name] = str(error)
            else:
                self.engines[name] = peer  # type: ignore[assignment]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the policies asked for and the peers."""
    args = lengths.parse(__doc__ or "", arguments)
    study, subject = lengths.prepare(args)
    run_study(study, subject, args, PeerBench)


if __name__ == "__main__":
    sys.exit(main())
