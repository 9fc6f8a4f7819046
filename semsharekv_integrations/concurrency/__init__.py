"""Calls in progress: who waits, which thread computes, who reads. Knows no models and no KV."""
