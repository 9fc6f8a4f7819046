"""A chat in the terminal that shows, for every answer, what was reused and how long the first token took.

Nothing is written to disk unless ``--save`` names a file. With ``--json`` each line of standard input is a turn, and
each line of standard output is a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.kv import Generation

HELP = "/exit ends the chat, /reset forgets the conversation, /stats shows the store"


@dataclass
class Conversation:
    """The messages so far; a turn that fails leaves them as they were."""

    engine: SemShareEngine
    system: str | None
    max_new_tokens: int
    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again with the system message alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, show: Callable[[str], None]) -> Generation:
        """One turn; ``show`` gets the answer piece by piece."""
        messages = [*self.messages, {"role": "user", "content": text}]
        options = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "session": "chat"}
        for chunk in self.engine.stream(messages, **options):  # type: ignore[arg-type]
            show(chunk.text)
            generation = chunk.generation
        assert generation is not None, "the last chunk carries the generation"
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        return generation


def run_chat(conversation: Conversation, console: Console, *, as_json: bool) -> None:
    """Turns until the input ends or the user leaves."""
    if not as_json:
        console.print(f"[bold]{conversation.engine.name}[/] · mode {conversation.engine.mode} · {HELP}")
    for text in _turns(console, as_json=as_json):
        if text == "/reset":
            conversation.reset()
        elif text == "/stats":
            console.print_json(data=conversation.engine.stats())
        elif as_json:
            _json_turn(conversation, text)
        else:
            _shown_turn(conversation, text, console)


def _turns(console: Console, *, as_json: bool) -> Iterator[str]:
    while True:
        try:
            text = sys.stdin.readline().rstrip("\n") if as_json else console.input("[bold cyan]you[/] ")
        except (EOFError, KeyboardInterrupt):
            return
        if text.strip() == "/exit" or (as_json and not text):
            return
        if text.strip():
            yield text.strip()


def _json_turn(conversation: Conversation, text: str) -> None:
    generation = conversation.say(text, lambda piece: None)
    line = {"text": generation.text, "finish_reason": generation.finish_reason, "kv_cache": generation.report.to_dict()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _shown_turn(conversation: Conversation, text: str, console: Console) -> None:
    console.print("[bold green]model[/] ", end="")
    try:
        report = conversation.say(
            text, lambda piece: console.print(piece, end="", markup=False, highlight=False)
        ).report
    except SemShareError as error:
        console.print(f"[red]{error}[/]")
        return
    console.print(
        f"\n[dim]{report.reused_tokens} of {report.prompt_tokens} prompt tokens reused · "
        f"first token after {report.ttft_s * 1000:.0f} ms · {report.output_tokens} tokens out[/]"
    )
