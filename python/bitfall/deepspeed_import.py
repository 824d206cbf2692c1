"""Makes `import deepspeed` give bitfall/deepspeed_shim in this process, and in no other.

Nothing is installed and a real DeepSpeed stays where it is: a finder in front of the others answers
for the name deepspeed, both as a module and as a distribution (importlib.metadata).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import TYPE_CHECKING

from bitfall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from os import PathLike
    from types import ModuleType

# Hugging Face asks for at least 0.9.3, and 0.18.2 before it tries sequence parallelism, for which
# the shim has a better answer than "please update". 0.19.6 is the last release whose configs may
# hold MoQ; 0.19.7 removed it, so nothing newer may be claimed.
VERSION = "0.19.6+bitfall"
EVERY_DISTRIBUTION = DistributionFinder.Context()
FOLDER = Path(__file__).with_name("deepspeed_shim")


def install() -> None:
    """From here on deepspeed is bitfall's in this process. A second call changes nothing.

    Raises InputError when another deepspeed is imported already: its modules cannot be exchanged.
    """
    if any(isinstance(finder, DeepspeedFinder) for finder in sys.meta_path):
        return
    if "deepspeed" in sys.modules:
        raise InputError(
            f"deepspeed is imported already, from {sys.modules['deepspeed'].__file__}: start the"
            " script with 'bitfall run', or install bitfall's before anything imports deepspeed"
        )
    sys.meta_path.insert(0, DeepspeedFinder())


class DeepspeedFinder(MetaPathFinder):
    """Answers for deepspeed; its submodules are then found in the package's own folder."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "deepspeed":
            return importlib.util.spec_from_file_location(
                fullname, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
            )
        if fullname.startswith("deepspeed.") and not _in_folder(fullname):
            raise ModuleNotFoundError(
                f"bitfall does not provide the module '{fullname}'. It stands in for the training"
                " engine of DeepSpeed with ZeRO stages 0 to 2 and MoQ; for anything else run the"
                " script with python and a real DeepSpeed",
                name=fullname,
            )
        return None

    def find_distributions(
        self, context: DistributionFinder.Context = EVERY_DISTRIBUTION
    ) -> Iterable[Distribution]:
        if context.name is None or re.sub(r"[-_.]+", "-", context.name).lower() == "deepspeed":
            yield ShimDistribution()


class ShimDistribution(Distribution):
    """What importlib.metadata.metadata("deepspeed") and version("deepspeed") read."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return (
                f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {VERSION}\n"
                "Summary: bitfall in place of DeepSpeed, in this process only\n"
            )
        return "deepspeed\n" if filename == "top_level.txt" else None

    def locate_file(self, path: str | PathLike[str]) -> Path:
        return FOLDER.parent / path


def _in_folder(fullname: str) -> bool:
    place = FOLDER.joinpath(*fullname.split(".")[1:])
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
