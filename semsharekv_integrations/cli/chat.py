"""``semsharekv chat``: a chat in the terminal that shows, for every answer, what was reused.

Ctrl-C ends an answer, or the chat if no answer is being written. Nothing is written to disk unless ``--save`` names a
file; what the chat holds is saved however it ends. With ``--json`` each line of standard input is a turn, and each line
of standard output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.report import Generation
from semsharekv_integrations.sampling import SamplingConfig
from semsharekv_integrations.terminal import WordWrap, add_engine_arguments, add_json_argument, load_engine

if TYPE_CHECKING:
    from semsharekv_integrations.engine import SemShareEngine

HELP = "/exit ends the chat, /reset forgets the conversation, /stats shows the store, Ctrl-C ends an answer"
_SPEAKER = "model "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``semsharekv chat``."""
    add_engine_arguments(parser)
    add_json_argument(parser)
    parser.add_argument("--system", default="You are a helpful assistant.", help="system message; empty for none")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (default: 256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="load stored KV from FILE if there; write it back")


def run(args: argparse.Namespace) -> int:
    """Load the engine, chat until the user leaves, save to ``args.save`` in any case; return 0."""
    SamplingConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature)  # refuses them before it loads
    if args.save:
        can_save = args.save.absolute().parent.is_dir() and not args.save.is_dir()
        require(can_save, "save", str(args.save), "a file in a folder that exists")
    engine = load_engine(args)
    if args.save and args.save.exists():
        engine.load(args.save)
    conversation = Conversation(engine, args.system, args.max_new_tokens, args.temperature)
    try:
        run_chat(conversation, Console(), as_json=args.json)
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was ending an answer
        pass
    finally:
        if args.save:
            engine.save(args.save)
    return 0


class Conversation:
    """The messages so far. A turn that raises, or is cut without text, adds none; nor does an empty ``system``."""

    def __init__(self, engine: SemShareEngine, system: str, max_new_tokens: int, temperature: float) -> None:
        self.engine = engine
        self._options: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "session": "chat"}
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Drop all messages but the system message, if there is one."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str, show: Callable[[str], None]) -> Generation | None:
        """Add a turn, giving ``show`` pieces of the answer; return it, or None if Ctrl-C cut it (text is kept)."""
        messages = [*self.messages, {"role": "user", "content": text}]
        said = ""
        generation: Generation | None = None
        try:
            with closing(self.engine.stream(messages, **self._options)) as chunks:
                for chunk in chunks:
                    said += chunk.text
                    show(chunk.text)
                    generation = chunk.generation
        except KeyboardInterrupt:
            generation = None
        if said or generation:
            answer = generation.text if generation else said
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        return generation


def run_chat(conversation: Conversation, console: Console, *, as_json: bool) -> None:
    """Answer each line of input, or do its command, until the input ends or the user leaves; errors are only shown.

    With ``as_json`` it prints one line of JSON for each of them, and no prompt.
    """
    if not as_json:
        console.print(f"[bold]{conversation.engine.name}[/] · mode {conversation.engine.mode} · {HELP}")
    for text in _read_turns(console, as_json=as_json):
        if text == "/reset":
            conversation.reset()
            if as_json:
                _print_json({"reset": True})
        elif text == "/stats" and as_json:
            _print_json(conversation.engine.stats())
        elif text == "/stats":
            console.print_json(data=conversation.engine.stats())
        elif as_json:
            _answer_in_json(conversation, text)
        else:
            _answer_on_screen(conversation, text, console)


def _read_turns(console: Console, *, as_json: bool) -> Iterator[str]:
    """Yield stripped lines that are not blank until ``/exit``, the end of the input, or Ctrl-C at the prompt."""
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
    """Read a line with its end, "" at the end of the input. A terminal gets a prompt, unless ``as_json``."""
    if as_json or not sys.stdin.isatty():
        return sys.stdin.readline()
    return f"{console.input('[bold cyan]you[/] ')}\n"


def _answer_in_json(conversation: Conversation, text: str) -> None:
    """Take one turn and print its answer, or its error, as a line of JSON."""
    pieces: list[str] = []
    line: dict[str, Any]
    try:
        generation = conversation.say(text, pieces.append)
    except (SemShareError, ValueError) as error:
        line = {"error": str(error)}
    else:
        line = {"text": "".join(pieces), "finish_reason": "interrupted", "kv_cache": None}
        if generation:
            report = generation.report.to_dict()
            line = {"text": generation.text, "finish_reason": generation.finish_reason, "kv_cache": report}
    _print_json(line)


def _print_json(line: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(line)}\n")
    sys.stdout.flush()


def _answer_on_screen(conversation: Conversation, text: str, console: Console) -> None:
    """Take one turn and print its answer as it grows, then what was reused; print an error in red."""
    console.print(f"[bold green]{_SPEAKER}[/]", end="")
    wrapper = WordWrap(lambda part: console.out(part, end="", highlight=False), console.width, len(_SPEAKER))
    try:
        generation = conversation.say(text, wrapper.add)
    except (SemShareError, ValueError) as error:
        console.print(f"\n{error}", style="red", markup=False, highlight=False)
        return
    wrapper.end()
    if generation is None:
        console.print("\n[dim]interrupted; once more ends the chat[/]")
        return
    report = generation.report
    drafted = f", {report.accepted_tokens} by lookup" if report.accepted_tokens else ""
    console.print(
        f"\n[dim]{report.reused_tokens} of {report.prompt_tokens} prompt tokens reused · "
        f"first token after {report.ttft_s * 1000:.0f} ms · {report.output_tokens} tokens out{drafted}[/]"
    )
