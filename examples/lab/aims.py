"""Hold what ``lengths.py --out FILE.md`` measured against the aims for speed and memory.

    PYTHONPATH=. python examples/lab/aims.py results/speed.json

Each aim is held against every policy that reuses KV, at the longest prompts measured of up to 5,000 tokens, whether met
or missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drawn import NEGATIVE_CONTROL
from lengths import split_name
from plots import read_rows
from semsharekv_integrations.lab.figures import Row
from semsharekv_integrations.lab.policies import FULL, RETAINED

AIM_LENGTH = 5_000  # tokens: aims are held against the longest prompts measured up to here
SPEED_AIMS: Mapping[str, float] = {  # least times faster to the first token than a full prefill, by scenario
    "next_turn": 20.0,
    "reordered": 10.0,
    "shared": 10.0,
    "reworded_10": 6.25,
    "reworded_30": 6.25,
    "reworded_50": 6.25,
}
MAX_OVERHEAD = 0.03  # of a full prefill's time, where nothing is alike
MIN_SAVED_KV = 0.42


@dataclass(frozen=True)
class Verdict:
    """One aim held against one policy.

    Attributes:
        aim: what is asked for, in words.
        policy: what ran.
        length: tokens asked for, at which it was measured.
        figure: what was measured, in words.
        met: whether that is enough.
    """

    aim: str
    policy: str
    length: int
    figure: str
    met: bool


def find_aim_length(rows: Iterable[Row]) -> int | None:
    """The longest length up to ``AIM_LENGTH`` at which something was measured, or None."""
    found = [split_name(row.scenario)[1] for row in rows if row.cases]
    return max((length for length in found if length and length <= AIM_LENGTH), default=None)


def judge(rows: Sequence[Row], policies: Iterable[str]) -> list[Verdict]:
    """Every aim held against each of ``policies``, at the aim length.

    Args:
        rows: of any scenarios and lengths; aims of those that were not measured are left out.
        policies: those that reuse KV.
    """
    length, wanted = find_aim_length(rows), list(policies)
    found = []
    for row in rows:
        ratio, kept = row["ttft_ratio"], row["kv_kept_ratio"]
        scenario, at = split_name(row.scenario)
        if at is None or at != length or row.policy not in wanted or ratio is None:
            continue
        if scenario in SPEED_AIMS:
            aim = SPEED_AIMS[scenario]
            words = f"{scenario}: first token {aim:g} times faster than off"
            found.append(Verdict(words, row.policy, length, f"{ratio.value:.2f} times", ratio.value >= aim))
        if scenario == NEGATIVE_CONTROL:
            overhead = 1 / ratio.value - 1
            words = f"{NEGATIVE_CONTROL}: overhead at most {MAX_OVERHEAD:.0%} of off"
            found.append(Verdict(words, row.policy, length, f"{overhead:+.1%}", overhead <= MAX_OVERHEAD))
        if row.policy == RETAINED and kept is not None:
            saved = 1 - kept.value
            words = f"{scenario}: {MIN_SAVED_KV:.0%} less KV kept"
            met = round(saved, 2) >= MIN_SAVED_KV  # kept are whole tokens
            found.append(Verdict(words, row.policy, length, f"{saved:.1%} less", met))
    return found


def main(paths: Sequence[str] | None = None) -> None:
    """Print the verdicts on each file as a Markdown table."""
    for path in map(Path, sys.argv[1:] if paths is None else paths):
        _, rows = read_rows(path)
        verdicts = judge(rows, dict.fromkeys(row.policy for row in rows if row.policy != FULL))
        lines = [(v.aim, v.policy, str(v.length), v.figure, "met" if v.met else "missed") for v in verdicts]
        header = ("aim", "policy", "asked", "measured", ""), ("---",) * 5
        print("\n".join(f"| {' | '.join(cells)} |" for cells in (*header, *lines)))
        if not lines:
            print(f"None of the scenarios that aims are for was measured at up to {AIM_LENGTH} tokens.")


if __name__ == "__main__":
    main()
