"""deepspeed.utils.logging: DeepSpeed's logger, whose level Hugging Face sets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch.distributed

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("DeepSpeed")


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the ranks named; on all of them without ranks, or where -1 is among them."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)
