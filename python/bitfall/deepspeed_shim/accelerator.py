"""deepspeed.accelerator: the device that scripts ask for, answered through torch."""

from __future__ import annotations

from typing import Any

import torch

from bitfall.bridge.placement import accelerator_name


class Accelerator:
    """CUDA where torch has it, otherwise the CPU, or as DS_ACCELERATOR says. Other names are
    torch.cuda's or torch.cpu's."""

    def __init__(self) -> None:
        self._name = accelerator_name()

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", "cuda:0" or "cpu"."""
        indexed = self._name == "cuda" and device_index is not None
        return f"cuda:{device_index}" if indexed else self._name

    def current_device_name(self) -> str:
        return self.device_name(torch.cuda.current_device() if self._name == "cuda" else None)

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(self.device_name(device_index))

    def set_device(self, device_index: int) -> None:
        if self._name == "cuda":
            torch.cuda.set_device(device_index)

    def communication_backend_name(self) -> str:
        return "nccl" if self._name == "cuda" else "gloo"

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self) -> bool:
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda if self._name == "cuda" else torch.cpu, name)


_accelerator = Accelerator()


def get_accelerator() -> Accelerator:
    """The one device of this process."""
    return _accelerator
