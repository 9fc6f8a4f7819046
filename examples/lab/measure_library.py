"""Measure a library of KV: what reading a document's KV takes beside computing it, here and calculated for an 8B model.

    PYTHONPATH=. python examples/lab/measure_library.py --model FOLDER --out examples/lab/results/library.md

Each document is computed into a library by ``semsharekv warm``'s own code, then read from it by a store that mounts it,
up to the copy that a prompt's cache is. Cold: the kernel was told to drop the files from its cache before, and the page
says how many of their bytes then came from the disk. ``--model`` can be given again. ``--quick`` is small.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lengths import find_quartiles
from semsharekv_integrations import StoreConfig
from semsharekv_integrations.kv import PrefixMatch, TokenIds
from semsharekv_integrations.lab.figures import Estimate
from semsharekv_integrations.lab.report import describe_machine, describe_origin, write_whole
from semsharekv_integrations.lab.texts import read_passages
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.library import read_manifest
from semsharekv_integrations.warming import ModelSpec, warm_folder

MIB, GIB = 1024**2, 1024**3
DTYPE = "float32"  # which every CPU computes
WAYS = ("cold", "first", "again")
TITLES = (
    "tokens",
    "KV, MiB",
    "computing, ms",
    "reading, cold, ms",
    "from disk",
    "from the system's cache, ms",
    "read before, ms",
    "computing : cold",
    "computing : read before",
)


class Large(NamedTuple):
    """What is assumed of a model that is not here, and of the machine that it runs on."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    number_bytes: int = 2
    prefill_rates: tuple[int, ...] = (10_000, 20_000)  # tokens a second
    disk_rates: tuple[float, ...] = (0.5, 1.25, 3, 7)  # GB a second
    tokens: tuple[int, ...] = (250, 1_000, 4_000, 16_000)

    @property
    def token_bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.number_bytes


@dataclass(frozen=True)
class Row:
    """What was measured of a document."""

    tokens: int
    num_bytes: int
    compute: Estimate
    reads: dict[str, Estimate]
    from_disk: float  # share of its bytes, when cold


def make_text(model: NamedModel, num_tokens: int) -> str:
    """Return a text of about so many tokens: passages one after another."""
    passages = read_passages()
    texts = "\n\n".join(passage.text for passage in passages)
    while len(model.tokenizer(texts)["input_ids"]) < num_tokens:
        texts = f"{texts}\n\n{texts}"
    ids = model.tokenizer(texts, return_offsets_mapping=True)
    return texts[: ids["offset_mapping"][num_tokens - 1][1]]


def drop_from_cache(files: Sequence[Path]) -> None:
    """Have the kernel forget what it has of files that nothing maps."""
    gc.collect()
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def count_read_bytes() -> int:
    """Return how many bytes this process has had read from disks."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["read_bytes"])


def copy_all(found: PrefixMatch) -> None:
    """Copy all KV of a match, as the cache of a prompt does."""
    for keys, values in found.reference.layers:
        keys.clone(), values.clone()


def time_it(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds that ``work`` takes, of the processor or by another clock."""
    began = clock()
    work()
    return clock() - began


class Reader:
    """Reads the one document of a library."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._facts = read_manifest(library).facts
        self.files = sorted(library.glob("*/*.safetensors"))
        self.num_bytes = sum(file.stat().st_size for file in self.files)
        self.token_ids = self._list_ids()

    def mount(self) -> KVStore:
        """Return a store that has read nothing yet."""
        store = KVStore(StoreConfig(libraries=[self._library]))
        store.mount(self._facts, getattr(torch, self._facts.dtype), torch.device("cpu"))
        return store

    def read(self, store: KVStore) -> None:
        """Find the document by its tokens, and copy its KV."""
        found = store.find_prefix(self.token_ids, "lab", max_tokens=len(self.token_ids))
        assert found is not None and found.num_tokens == len(self.token_ids)
        copy_all(found)

    def _list_ids(self) -> TokenIds:
        store = self.mount()
        (reference,) = (one for name in store.list_libraries() for one in store.references(name))
        return np.asarray(reference.token_ids)


def measure_reads(reader: Reader, repeats: int) -> tuple[dict[str, Estimate], float]:
    """Return the seconds of reading in each of ``WAYS``, and the share of bytes that came from the disk when cold."""
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    shares = []
    for _ in range(repeats):
        fresh = reader.mount()
        drop_from_cache(reader.files)
        before = count_read_bytes()
        took["cold"].append(time_it(partial(reader.read, fresh), time.perf_counter))
        shares.append((count_read_bytes() - before) / reader.num_bytes)
        fresh = reader.mount()
        took["first"].append(time_it(partial(reader.read, fresh)))
        took["again"].append(time_it(partial(reader.read, fresh)))
        del fresh  # and what it has mapped, which could not be dropped
    return {way: find_quartiles(seconds) for way, seconds in took.items()}, float(np.median(shares))


def measure(name: str, lengths: Sequence[int], repeats: int, prefills: int) -> tuple[list[Row], dict[str, object]]:
    """Return a row for each length, and what the model and machine are."""
    source = NamedModel(name, "cpu", DTYPE, {})
    adapter = ModelAdapter(source.load(), "off")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            documents, library = Path(folder, f"documents {length}"), Path(folder, f"kv {length}")
            documents.mkdir()
            (documents / "text.txt").write_text(make_text(source, length), encoding="utf-8")
            summary = warm_folder(documents, library, ModelSpec(name, "cpu", DTYPE))
            assert summary.computed == 1, summary
            reader = Reader(library)
            ids = reader.token_ids
            adapter.prefill(ids[:64])  # what the first call builds
            compute = find_quartiles([time_it(partial(adapter.prefill, ids)) for _ in range(prefills)])
            reads, share = measure_reads(reader, repeats)
            rows.append(Row(len(ids), reader.num_bytes, compute, reads, share))
    return rows, describe_machine(adapter.model)


def show(took: Estimate) -> str:
    """Return milliseconds with quartiles."""
    digits = 1 if took.value < 0.1 else 0
    low, value, high = (f"{1000 * seconds:,.{digits}f}" for seconds in (took.low, took.value, took.high))
    return f"{value} [{low}, {high}]"


def make_measured_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of what was measured on one model."""
    yield f"| {' | '.join(TITLES)} |"
    yield "| --- " * len(TITLES) + "|"
    for row in rows:
        ratios = [f"{row.compute.value / row.reads[way].value:.0f}" for way in ("cold", "again")]
        cold, first, again = (show(row.reads[way]) for way in WAYS)
        cells = (f"{row.tokens:,}", f"{row.num_bytes / MIB:.1f}", show(row.compute), cold, f"{row.from_disk:.0%}")
        yield f"| {' | '.join((*cells, first, again, *ratios))} |"


def make_calculated_table(large: Large, fixed_s: float) -> Iterator[str]:
    """Yield the lines of what an 8B model would take: seconds of reading from disks beside those of a prefill."""
    yield (
        "| disk, GB/s | tokens read a second | times a prefill of "
        + " | of ".join(f"{rate:,} tokens/s" for rate in large.prefill_rates)
        + " | from how many tokens on |"
    )
    yield "| --- " * (3 + len(large.prefill_rates)) + "|"
    for disk in large.disk_rates:
        rate = disk * 1e9 / large.token_bytes
        ratios = [f"{rate / prefill:.1f}" for prefill in large.prefill_rates]
        starts = [find_start(prefill, rate, fixed_s) for prefill in large.prefill_rates]
        told = " and ".join("never" if start is None else f"{start:,}" for start in starts)
        yield f"| {disk:g} | {rate:,.0f} | {' | '.join(ratios)} | {told} |"


def find_start(prefill_rate: float, read_rate: float, fixed_s: float) -> int | None:
    """Return from how many tokens on reading takes less than a prefill, given what every read takes; None if never."""
    saved_s = 1 / prefill_rate - 1 / read_rate
    return None if saved_s <= 0 else max(1, int(np.ceil(fixed_s / saved_s)))


def estimate_fixed(rows: Sequence[Row]) -> float:
    """Return the seconds of a cold read that do not grow with its bytes, by a line through what was measured."""
    sizes, seconds = [row.num_bytes for row in rows], [row.reads["cold"].value for row in rows]
    fixed = np.polyfit(sizes, seconds, 1)[1] if len(rows) > 1 else seconds[0]
    return float(max(fixed, 0.001))


def make_page(
    measured: dict[str, tuple[list[Row], dict[str, object]]], command: str, repeats: int, prefills: int
) -> str:
    """Return the page."""
    large, parts = Large(), [LEGEND.format(repeats=repeats, prefills=prefills)]
    for name, (rows, about) in measured.items():
        commit = str(describe_origin(command)["commit"])[:12]
        told = f"`{command}` at commit {commit}: {about['dtype']} on {about['device']}"
        parts.append(f"## {Path(name).name}\n\n{told}\n\n" + "\n".join(make_measured_table(rows)))
    fixed_s = float(np.median([estimate_fixed(rows) for rows, _ in measured.values()]))
    best = max(row.num_bytes / row.reads["first"].value for rows, _ in measured.values() for row in rows)
    needed = " and ".join(f"{rate * large.token_bytes / 1e9:.1f} GB/s" for rate in large.prefill_rates)
    slow, fast = large.prefill_rates
    figures = {"kib": large.token_bytes // 1024, "fixed": 1000 * fixed_s, "needed": needed, "rate": best / 1e9}
    told = CALCULATED.format(large=large, slow=slow, fast=fast, **figures)
    parts.append(told + "\n".join(make_calculated_table(large, fixed_s)))
    return "\n\n".join(parts)


LEGEND = """# A library of KV: reading beside computing

Milliseconds of processor time, as other work ran on the machine, but for cold reads, which are on the wall, against
that other work; median and quartiles of {repeats} reads and {prefills} prefills. Computing is a full prefill of the
document on one core. Reading ends with a copy of all KV, as a prompt's cache is one. Cold: the files were dropped from
the system's cache; the column beside it says how many of their bytes then came from the disk. A process checks a
file's bytes (XXH3) on its first read; one that has read it before only looks whether the file is still the same, and
copies what is mapped."""

CALCULATED = """## Calculated: an 8B model on a GPU

Not measured. Assumed: {large.layers} layers, {large.kv_heads} KV heads of {large.head_dim} numbers in half precision,
which is {kib} KiB a token; a GPU of the H100's class that prefills {slow:,} to {fast:,} tokens a second (short prompts;
long ones are slower, and favour reading); disks that deliver what they promise in sequential reads, as NVMe does with 3
to 7 GB/s, 10-gigabit Ethernet with 1.25 and SATA with 0.5; {fixed:.1f} ms for each read whatever its size, as measured
here. Copying to the device goes over PCIe meanwhile, at more than a disk delivers. A first read checks the bytes as
well: with the copy, up to {rate:.1f} GB/s on one core here; up to four threads share it.

From {needed} on, reading is faster than computing {slow:,} and {fast:,} tokens a second. What lies in the system's
cache is read as fast as memory is copied. The last column says from how many tokens on, at either rate.

"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"can be given again (default: {REFERENCE_MODEL})")
    parser.add_argument("--tokens", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--quick", action="store_true", help="little, to see that all of it works")
    args = parser.parse_args(arguments)
    if args.quick:
        args.tokens, args.repeats, args.prefills = [64, 256], 2, 1
    torch.set_num_threads(args.threads)
    models = args.model or [REFERENCE_MODEL]
    measured = {name: measure(name, args.tokens, args.repeats, args.prefills) for name in models}
    named = [f"--model {shlex.quote(Path(name).name)}" for name in models]
    command = f"python examples/lab/measure_library.py {' '.join(named)} --threads {args.threads}"
    text = make_page(measured, command, args.repeats, args.prefills)
    if args.out is None:
        print(text)
    else:
        write_whole(args.out, text + "\n")


if __name__ == "__main__":
    main()
