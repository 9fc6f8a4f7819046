"""``semsharekv chat``: a chat in the terminal that shows, for every answer, what was reused.

Ctrl-C ends an answer, and the chat where none is being written. Nothing is written to disk unless ``--save`` names a
file; however the chat ends, what it holds then is saved. With ``--json`` each line of standard input is a turn, and
each line of standard output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from semsharekv_integrations.cli.terminal import WordWrap, add_engine_arguments, load_engine
from semsharekv_integrations.config import SamplingConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.report import Generation

HELP = "/exit ends the chat, /reset forgets the conversation, /stats shows the store, Ctrl-C ends an answer"
_MODEL = "model "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_engine_arguments(parser)
    parser.add_argument("--system", default="You are a helpful assistant.", help="system message; empty for none")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="load stored KV from FILE if there; write it back")


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends, and save whatever ended it.

    Raises:
        SemShareError: if the model or the file cannot be loaded, or the file not be written.
        ValueError: for an argument that is out of bounds.
    """
    SamplingConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    if args.save:
        there = args.save.absolute().parent.is_dir() and not args.save.is_dir()
        require(there, "save", str(args.save), "a file in a folder that exists")
    engine = load_engine(args)
    if args.save and args.save.exists():
        engine.load(args.save)
    conversation = Conversation(engine, args.system or None, args.max_new_tokens, args.temperature)
    try:
        run_chat(conversation, Console(), as_json=args.json)
    except KeyboardInterrupt:  # a second one, while the first one ended an answer
        pass
    finally:
        if args.save:
            engine.save(args.save)
    return 0


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

    def say(self, text: str, show: Callable[[str], None]) -> Generation | None:
        """One turn; ``show`` gets the answer piece by piece.

        Returns:
            None if Ctrl-C ended the answer: what there was of it is part of the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        options = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "session": "chat"}
        said: list[str] = []
        generation: Generation | None = None
        try:
            with closing(self.engine.stream(messages, **options)) as chunks:  # type: ignore[arg-type]
                for chunk in chunks:
                    said.append(chunk.text)
                    show(chunk.text)
                    generation = chunk.generation
        except KeyboardInterrupt:
            generation = None
        answer = generation.text if generation else "".join(said)
        if answer or generation:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
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
            line = _read_line(console, as_json=as_json)
        except (EOFError, KeyboardInterrupt):
            if not as_json:
                console.print()
            return
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _read_line(console: Console, *, as_json: bool) -> str:
    """A line with its end, or nothing where there is no more; a terminal is prompted."""
    if as_json or not sys.stdin.isatty():
        return sys.stdin.readline()
    return f"{console.input('[bold cyan]you[/] ')}\n"


def _json_turn(conversation: Conversation, text: str) -> None:
    pieces: list[str] = []
    try:
        generation = conversation.say(text, pieces.append)
    except (SemShareError, ValueError) as error:
        line = {"error": str(error)}
    else:
        reason = generation.finish_reason if generation else "interrupted"
        report = generation.report.to_dict() if generation else None
        said = generation.text if generation else "".join(pieces)
        line = {"text": said, "finish_reason": reason, "kv_cache": report}  # type: ignore[dict-item]
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _shown_turn(conversation: Conversation, text: str, console: Console) -> None:
    console.print(f"[bold green]{_MODEL}[/]", end="")
    shown = WordWrap(lambda part: console.out(part, end="", highlight=False), console.width, len(_MODEL))
    try:
        generation = conversation.say(text, shown.add)
    except (SemShareError, ValueError) as error:
        console.print(f"\n{error}", style="red", markup=False, highlight=False)
        return
    shown.end()
    if generation is None:
        console.print("\n[dim]interrupted; once more ends the chat[/]")
        return
    report = generation.report
    console.print(
        f"\n[dim]{report.reused_tokens} of {report.prompt_tokens} prompt tokens reused · "
        f"first token after {report.ttft_s * 1000:.0f} ms · {report.output_tokens} tokens out[/]"
    )
