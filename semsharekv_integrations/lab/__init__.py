"""The lab measures what reuse does to answers, time and memory: scenarios under policies give figures in a report.

One run gives figures of quality and of speed. Nothing but the command line and the tests may import the lab. Training,
sweeps, plots and comparisons with others are scripts in ``examples/lab`` over this package.
"""
