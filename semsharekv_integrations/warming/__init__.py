"""Computes the KV of a folder of documents once, for engines that mount the result: ``semsharekv warm``."""

from semsharekv_integrations.warming.building import Summary, warm_folder
from semsharekv_integrations.warming.computing import ModelSpec

__all__ = ["ModelSpec", "Summary", "warm_folder"]
