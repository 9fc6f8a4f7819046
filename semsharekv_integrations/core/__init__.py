"""Pure functions on arrays and tensors: no model, no store, no framework."""
