"""The package that `import deepspeed` gives under `bitfall run`: DeepSpeed's names over bitfall.

Whatever is not here raises an AttributeError or ImportError that says so.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    raise ImportError(
        "deepspeed under 'bitfall run' needs PyTorch: pip install 'bitfall[torch]'"
    ) from None

from bitfall.bridge import DeepSpeedEngine
from bitfall.bridge.initialize import initialize as bitfall_initialize
from bitfall.deepspeed_import import VERSION

from . import accelerator, checkpoint, comm, ops, runtime, utils, zero
from ._refusal import missing_attributes, refused
from .comm import init_distributed

if TYPE_CHECKING:
    import argparse

__all__ = [
    "DeepSpeedEngine",
    "__version__",
    "accelerator",
    "add_config_arguments",
    "checkpoint",
    "comm",
    "init_distributed",
    "init_inference",
    "initialize",
    "ops",
    "runtime",
    "tp_model_init",
    "utils",
    "zero",
]

__version__ = VERSION
__getattr__ = missing_attributes("deepspeed")

init_inference = refused(
    "deepspeed.init_inference", "bitfall trains; load the saved model with transformers instead"
)
tp_model_init = refused(
    "deepspeed.tp_model_init", "tensor parallelism is not planned: use data parallelism"
)


@functools.wraps(bitfall_initialize)
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """bitfall.initialize, after torch.distributed is set up as DeepSpeed leaves it: Hugging Face
    takes barriers and gathers metrics there, with one process too."""
    if kwargs.get("dist_init_required") is not False:
        init_distributed()
    return bitfall_initialize(*args, **kwargs)


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --deepspeed and --deepspeed_config, which initialize(args=...) reads."""
    group = parser.add_argument_group("DeepSpeed", "configuration of the training engine")
    group.add_argument("--deepspeed", action="store_true", help="use the engine")
    group.add_argument("--deepspeed_config", type=str, default=None, help="its JSON file")
    return parser
