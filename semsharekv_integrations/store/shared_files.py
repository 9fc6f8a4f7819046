"""The KV files of a library: read and mapped, never written, by processes of whoever may read them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

import torch

from semsharekv_integrations.store.files import Identity, KVFiles, identify, open_kv
from semsharekv_integrations.store.ownership import is_directory
from semsharekv_integrations.store.reading import TensorFile
from semsharekv_integrations.store.records import FileRecord

_MOST_MAPPED = 1024  # files at a time: the system maps some tens of thousands for a process


class LibraryFiles(KVFiles):
    """The KV files in ``path``, which belong to the user number ``owner``. Increments ``counts`` for every trouble.

    Files stay mapped, the latest ones: a call looks whether a file is still the one that was checked, and reads
    nothing else. Whoever shortens a file while a call uses it ends that call's process, as with any mapped file.
    """

    def __init__(self, path: Path, fingerprint: str, counts: Counter[str], owner: int) -> None:
        super().__init__(path, fingerprint, counts)
        self._owner = owner
        self._mapped: OrderedDict[str, tuple[Identity, dict[str, torch.Tensor]]] = OrderedDict()

    def read(self, file: str) -> dict[str, torch.Tensor]:
        """As ``KVFiles.read``; checks all bytes again if the file is another, or was written since."""
        record = self._find(file)
        known = self._mapped.pop(file, None)
        with self._judge(record):
            identity = identify(self._locate(file).lstat())
        if known is None or known[0] != identity:
            known = self._map_checked(record)
        self._mapped[file] = known
        while len(self._mapped) > _MOST_MAPPED:
            self._mapped.popitem(last=False)
        return known[1]

    def _map_checked(self, record: FileRecord) -> tuple[Identity, dict[str, torch.Tensor]]:
        """Check all bytes of a file and map it; return it with its identity. Raises as ``describe``."""
        self._check(record)
        tensors = self._map(record)
        with self._judge(record):
            if identify(self._locate(record.id).lstat()) != self._verified[record.id]:
                raise OSError("it was written meanwhile")
        return self._verified[record.id], tensors

    def _open_file(self, path: Path, num_bytes: int) -> TensorFile:
        return open_kv(path, num_bytes, owner=self._owner)

    def _is_there(self) -> bool:
        return is_directory(self.path)
