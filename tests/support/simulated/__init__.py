"""The parts of the simulated accelerator; ``simulated_device`` is how tests use it."""
