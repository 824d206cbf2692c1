"""Checkpoints that DeepSpeed wrote, read without DeepSpeed, torch or foreign code."""

from bitfall.deepspeed_checkpoint.checkpoint import DeepSpeedCheckpoint, read_deepspeed_checkpoint
from bitfall.deepspeed_checkpoint.folder import checkpoint_folder, is_deepspeed_checkpoint

__all__ = [
    "DeepSpeedCheckpoint",
    "checkpoint_folder",
    "is_deepspeed_checkpoint",
    "read_deepspeed_checkpoint",
]
