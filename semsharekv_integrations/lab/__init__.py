"""The lab measures what reuse does to answers, time and memory: scenarios under policies give figures in a report.

One run gives figures of quality and of speed. It has what a user runs, ``semsharekv bench``; no other part may import
it. Training, drawn prompts, lengths, sweeps, plots and comparisons with others are scripts in ``examples/lab``.
"""
