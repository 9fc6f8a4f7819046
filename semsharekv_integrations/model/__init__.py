"""The only importers of transformers' internals: loading, rendering, prefill and decoding."""
