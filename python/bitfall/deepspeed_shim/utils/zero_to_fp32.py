"""deepspeed.utils.zero_to_fp32: the f32 weights of a checkpoint, DeepSpeed's own or bitfall's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitfall.checkpoint_weights import read_checkpoint_weights
from bitfall.safetensors_file import write_safetensors

from .. import _refusal

__getattr__ = _refusal.missing_attributes("deepspeed.utils.zero_to_fp32")


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: str | None = None
) -> dict[str, torch.Tensor]:
    """Name -> tensor on the CPU, f32; integer buffers keep their dtype.

    `checkpoint_dir` holds `latest`, or the folder `tag`. Raises CheckpointError.
    """
    weights = read_checkpoint_weights(Path(checkpoint_dir), tag).arrays
    return {name: torch.from_numpy(array.copy()) for name, array in weights.items()}


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str, tag: str | None = None
) -> torch.nn.Module:
    """Loads the f32 weights into `model`, moved to the CPU, and returns it."""
    model = model.cpu()
    model.load_state_dict(
        get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False
    )
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str, output_dir: str, tag: str | None = None, **options: Any
) -> None:
    """Writes `output_dir`/model.safetensors, in one file whatever `options` ask for."""
    del options
    weights = read_checkpoint_weights(Path(checkpoint_dir), tag).arrays
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_safetensors(Path(output_dir) / "model.safetensors", weights, {"format": "pt"})
