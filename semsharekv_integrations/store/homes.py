"""Where a model takes KV: on one device, or each layer's where that layer is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from semsharekv_integrations.kv import LayerKV, State

_LAYER = re.compile(r"(?:\d+@)?(\d+)[./]")  # in the name of a tensor of a layer, or of a state of one


class Homes(NamedTuple):
    """The device of each layer, or one for all."""

    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, where: Homes | torch.device) -> Homes:
        """Return homes as they are; for a device, those of layers that all lie there."""
        return where if isinstance(where, Homes) else cls((where,))

    @classmethod
    def from_devices(cls, devices: Sequence[torch.device]) -> Homes:
        """Return the homes of layers that lie on ``devices``, one for each layer and at least one."""
        return cls(tuple(devices) if len(set(devices)) > 1 else (devices[0],))

    @classmethod
    def find(cls, layers: Sequence[LayerKV], checkpoints: Mapping[int, State]) -> Homes:
        """Return where ``layers`` lie; one without KV per token lies where its states do, if it has any."""
        first = next((layer.keys.device for layer in layers if layer.keys.shape[1]), layers[0].keys.device)
        devices = [layer.keys.device if layer.keys.shape[1] else first for layer in layers]
        for name, tensor in next(iter(checkpoints.values()), {}).items():
            index = int(name.partition("/")[0])
            if tensor.ndim and not layers[index].keys.shape[1]:
                devices[index] = tensor.device
        return cls.from_devices(devices)

    def get(self, name: str) -> torch.device:
        """Return the device of the tensor ``name`` of a ``PackedKV``."""
        if len(self.devices) == 1:
            return self.devices[0]
        found = _LAYER.match(name)
        assert found is not None, "tensors are named by their layer"
        return self.devices[int(found[1])]

    @property
    def on_cuda(self) -> bool:
        """Whether any layer is on CUDA."""
        return any(device.type == "cuda" for device in self.devices)


HOST = Homes((torch.device("cpu"),))
