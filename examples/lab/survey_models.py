"""Try every causal type that transformers has, tiny and with random weights: which mode works on which?

    PYTHONPATH=. python examples/lab/survey_models.py --jobs 2 --out docs/models.md
    PYTHONPATH=. python examples/lab/survey_models.py --only llama mamba2 --out new.md

Each type runs in a process of its own, with bounds on memory and time. What is found is kept beside ``--out`` as JSON
lines, from which a run that was stopped goes on. The table takes the place of an earlier one at the end of the page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from datetime import date
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from semsharekv_integrations.lab.command import parse_count
from semsharekv_integrations.lab.report import describe_origin, record_command, write_whole
from semsharekv_integrations.terminal import HelpFormatter
from survey_checks import CRASHED, MODES, NOT_RUN, Finding, check_model, describe

_TABLE = tomllib.loads(Path(__file__).with_name("survey.toml").read_text(encoding="utf-8"))
SIZES: Mapping[str, int] = _TABLE["sizes"]
FIXED: Mapping[str, Any] = _TABLE["fixed"]
TYPES: Mapping[str, dict[str, Any]] = _TABLE["types"]
VOCABULARY = SIZES["vocab_size"]  # tokens, of which the first are special and the last are no text's
LAYER_FIELDS: Sequence[str] = _TABLE["layers"]["names"]
LAYERS = 4
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SPREAD = 0.12  # of weights; as models begin, all tokens look alike
EMBEDDING_SPREAD = 1.0  # as in trained models, where a token's own part of a hidden state outweighs its context's
SEED = 11
MEMORY_BYTES = 8 * 1024**3  # of address space that a process may take, most of it for code
SECONDS = 240  # that a type may take
HEADING = "## Every causal type of transformers"
LEGEND = (
    "Tiny models with random weights. Prompts have 7 to 130 tokens, windows and chunks 9 to 18. In `exact` prompts "
    "begin alike; in `identical` documents stand in another order. `equal`: the tokens of `generate`. `reused`: the "
    "same, and the store was used. In `identical` they are the same with everything computed again, and in a single "
    "layer of each kind, where moved KV is exact, with nothing computed again. `fell back`: right in these, but in "
    "four layers the guard of deviation asked for a full prefill, as context weighs more in random weights than in "
    "trained ones. A type that transformers itself cannot build or run says why under `off`."
)
Row = dict[str, Any]  # of a type: ``type``, ``built`` (a class), ``seconds``, and a finding of each mode


def build_tiny_model(model_type: str, only_kind: str | None = None) -> PreTrainedModel:
    """A random float32 model of a causal type of transformers in evaluation mode, the same at every call.

    It has four layers, or with ``only_kind`` a single one of that kind: one of ``layer_types``, or "" without them.
    """
    config = build_tiny_config(model_type, only_kind)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no answer ends early
    spread_weights(model)
    return model


def build_single_layers(model_type: str) -> Iterator[PreTrainedModel]:
    """Models of one layer, one of each kind that the type has; nothing for a kind that cannot stand alone."""
    config = build_tiny_config(model_type).get_text_config(decoder=True)
    for kind in dict.fromkeys(getattr(config, "layer_types", None) or [""]):
        with suppress(Exception):  # whatever a type may need of its other layers
            model = build_tiny_model(model_type, kind)
            if model.config.get_text_config(decoder=True).num_hidden_layers == 1:  # and not of several attentions
                yield model


def build_tiny_config(model_type: str, only_kind: str | None = None) -> PreTrainedConfig:
    """The configuration of that type with everything small: windows shorter than prompts, each kind of layer there."""
    return _Shrinker(only_kind).shrink(CONFIG_MAPPING[model_type], {})


class _Shrinker:
    """Makes configurations small, those within them as well."""

    def __init__(self, only_kind: str | None) -> None:
        self._only_kind = only_kind
        self._layers = LAYERS if only_kind is None else 1

    def shrink(self, kind: type[PreTrainedConfig], more: Mapping[str, Any]) -> PreTrainedConfig:
        """A configuration of that class; ``more`` are fields that stand above the rules, by name."""
        usual = vars(kind())
        more = {**TYPES.get(kind.model_type, {}), **more}
        changes: dict[str, Any] = {"is_decoder": True} if kind.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else {}
        for field in fields(kind):  # type: ignore[arg-type]
            value = usual.get(kind.attribute_map.get(field.name, field.name))
            if isinstance(value, PreTrainedConfig):
                changes[field.name] = self.shrink(type(value), more.get(field.name, {}))
            elif field.name == "layer_types" and self._only_kind:
                changes[field.name] = [self._only_kind]
            elif field.name in more:
                changes[field.name] = more[field.name]
            else:
                changes |= self._shrink_field(field.name, value, usual)
        return kind(**{**more, **changes})

    def _shrink_field(self, name: str, value: object, usual: Mapping[str, Any]) -> dict[str, Any]:
        """What takes the place of a field's usual value, by name; nothing where it stays."""
        if name in FIXED:
            return {name: FIXED[name]}
        if name.endswith(("_token_id", "_token_index")):
            return {name: SPECIAL.get(name, VOCABULARY - 1)} if isinstance(value, (int, list)) else {}
        if name == "num_key_value_heads":
            return {name: 4 if "kv_lora_rank" in usual else 2}
        if isinstance(value, list) and len(value) == usual.get("num_hidden_layers"):
            kinds = list(dict.fromkeys(value))  # in the order in which they come
            if kinds == ["full_attention"] and "sliding_window" in usual:
                kinds.append("sliding_attention")
            number = max(LAYERS, len(kinds)) if self._only_kind is None else 1
            return {name: list(islice(cycle(kinds), number))}
        small = self._layers if name in LAYER_FIELDS else SIZES.get(name)
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return {} if small is None or not is_size else {name: small}


@torch.no_grad()
def spread_weights(model: PreTrainedModel) -> None:
    """Make weights that begin near 0 larger, and those that begin alike unlike, so that every one of them matters."""
    for parameter in model.parameters():
        spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        if spread < 1e-6:
            parameter.add_(torch.randn_like(parameter) * SPREAD)
        elif parameter.ndim > 1 and spread < SPREAD:
            parameter.mul_(SPREAD / spread)
    embeddings = model.get_input_embeddings().weight
    embeddings.mul_(EMBEDDING_SPREAD / embeddings.std())


def survey_type(model_type: str) -> Iterable[tuple[str, Any]]:
    """What is found for a type, as soon as it is: the class that was built, or why none was, and findings by mode."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        model = build_tiny_model(model_type)
    except Exception as error:
        yield "off", Finding("off", NOT_RUN, f"not built: {describe(error)}").to_dict()
        return
    yield "built", type(model).__name__
    for finding in check_model(model, VOCABULARY, build_single_layers(model_type)):
        yield finding.mode, finding.to_dict()


def _send_findings(model_type: str, sender: Connection) -> None:
    """``survey_type`` in a process of its own."""
    for found in survey_type(model_type):
        sender.send(found)
    sender.send(("done", True))


def survey_apart(model_type: str) -> Row:
    """``survey_type`` in a process of its own; what ends the process is told at the mode that was tried."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_send_findings, args=(model_type, sender))
    began, row = time.monotonic(), {"type": model_type, "built": None}
    process.start()
    sender.close()  # so that the end of the process is seen
    why = f"more than {SECONDS} s"
    try:
        while "done" not in row and receiver.poll(max(0.0, SECONDS - time.monotonic() + began)):
            name, value = receiver.recv()
            row[name] = value
    except EOFError:
        process.join()
        why = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if not row.pop("done", False):
        mode = next(mode for mode in MODES if mode not in row)
        row[mode] = Finding(mode, CRASHED, why).to_dict()
    return row | {"seconds": round(time.monotonic() - began, 1)}


_PROCESSES = multiprocessing.get_context("forkserver")  # which loads torch once for all


def read_rows(path: Path, origin: Mapping[str, Any]) -> dict[str, Row]:
    """What an earlier run of the same versions found, by type; begins the file if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        write_whole(path, f"{json.dumps(origin)}\n")
        return {}
    if json.loads(lines[0]) != origin:
        raise ValueError(f"{path} is of another commit or other versions; accepted is another --out, or to delete it")
    return {row["type"]: row for row in map(json.loads, lines[1:])}


def survey(types: Sequence[str], journal: Path, jobs: int) -> list[Row]:
    """Every type's row in order, those in the journal as they are there."""
    described = describe_origin("")
    origin = {name: described[name] for name in ("commit", "uncommitted_changes", "versions")}
    rows = read_rows(journal, origin)
    left = [name for name in types if name not in rows]
    _PROCESSES.set_forkserver_preload(["semsharekv_integrations.engine", "transformers", "survey_checks"])
    with ThreadPoolExecutor(jobs) as threads, journal.open("a", encoding="utf-8") as file:
        for number, row in enumerate(threads.map(survey_apart, left), 1):
            file.write(f"{json.dumps(row)}\n")
            file.flush()
            rows[row["type"]] = row
            print(f"{number}/{len(left)} {row['type']}: {', '.join(_show_cells(row)[1:])}", flush=True)
    return [rows[name] for name in types]


def make_section(rows: Sequence[Row], command: str) -> str:
    """The part of the page that is made: where it is from, totals, and a line for each type."""
    origin = describe_origin(command)
    versions = ", ".join(
        f"{name} {number}" for name, number in origin["versions"].items() if name != "semsharekv-integrations"
    )
    counted = {mode: Counter(row[mode]["status"] for row in rows if mode in row) for mode in MODES}
    totals = [
        f"| `{mode}` | {', '.join(f'{count} {name}' for name, count in found.most_common())} |"
        for mode, found in counted.items()
    ]
    table = [
        f"| {' | '.join(cells)} |" for cells in ([("type", *MODES), ("---",) * 4] + [_show_cells(row) for row in rows])
    ]
    return "\n".join(
        [
            HEADING,
            "",
            LEGEND,
            "",
            f"{len(rows)} types, {date.today().isoformat()}, `{origin['command']}` with {versions}:",
            "",
            "| mode | types |",
            "|---|---|",
            *totals,
            "",
            *table,
            "",
        ]
    )


def _show_cells(row: Row) -> tuple[str, ...]:
    """A type and what each mode gave; a dash for what was not tried."""
    return row["type"], *(_show_finding(row[mode], row["built"]) if mode in row else "-" for mode in MODES)


def _show_finding(found: Mapping[str, Any], built: str | None) -> str:
    """What came of a mode, without the class, which the type tells, and without the mode that is there instead."""
    why = found["why"].partition("; use mode")[0].replace("|", "/").removeprefix(f"{built}").lstrip(": ")
    return f"{found['status']}: {why}" if why else found["status"]


def write_section(out: Path, section: str) -> None:
    """Put the section in place of an earlier one at the end of the page, or behind what is there."""
    above = out.read_text(encoding="utf-8").partition(HEADING)[0].rstrip() if out.exists() else ""
    write_whole(out, f"{above}\n\n{section}".lstrip())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", choices=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--jobs", type=parse_count, default=1, metavar="N", help="processes at a time (1)")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="Markdown page that the table ends")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Survey the types asked for, and write the table."""
    args = parse(arguments)
    types = args.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = survey(types, args.out.with_suffix(".jsonl"), args.jobs)
    write_section(args.out, make_section(rows, record_command("python examples/lab/survey_models.py", arguments)))


if __name__ == "__main__":
    sys.exit(main())
