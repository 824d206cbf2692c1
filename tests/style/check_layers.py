"""Fails on an include that points up the layers, or that leaves a layer's own allowance.

usage: check_layers.py [ROOT]
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Folder -> folders whose headers it may include besides its own.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "eigen_sched": {"core"},
    "quantizer": {"core", "eigen_sched"},
    "csrc_cpu": {"core"},
    "csrc_cuda": {"core"},
    "engine": {"core", "quantizer", "eigen_sched", "csrc_cpu", "csrc_cuda"},
    "python": {"core", "quantizer", "eigen_sched", "engine"},
}
# Plain headers on core alone: arithmetic with one definition, shared by the kernels of every
# device, and the config values that say how and when weights are quantized.
SHARED_HEADERS = {"quantizer/quant_math.h", "quantizer/quantize_config.h"}
# Header prefix -> the only places that may include it.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "nlohmann/": ("engine/",),
    "pybind11/": ("python/",),
    "oneapi/": ("csrc_cpu/",),
    "dnnl": ("csrc_cpu/",),
    "mpi.h": ("csrc_cpu/",),
    "omp.h": ("csrc_cpu/",),
    "cu": ("csrc_cuda/",),  # cuda_runtime.h, cublasLt.h, ...
    "nccl.h": ("csrc_cuda/",),
    "mma.h": ("csrc_cuda/",),
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def problem(path: str, bracket: str, header: str) -> str | None:
    """Says what is wrong with `#include header` in `path` (both from the root), or None."""
    layer = path.split("/", 1)[0]
    for prefix, places in THIRD_PARTY.items():
        if header.startswith(prefix) and not path.startswith(places):
            return f"<{header}> may only be included in {', '.join(places)}"
    if bracket == "<":
        return None
    if "/" not in header:
        return f'"{header}": write includes from the root of the project'
    target = header.split("/", 1)[0]
    if target == layer or target in ALLOWED[layer] or header in SHARED_HEADERS:
        return None
    allowed = ", ".join(sorted(ALLOWED[layer])) or "nothing"
    return f'"{header}": {layer}/ may include {layer}/ and {allowed}'


def problems(root: Path) -> Iterator[str]:
    """Yields "file:line: what" for every include that breaks the rules."""
    for layer in ALLOWED:
        for file in sorted((root / layer).rglob("*")):
            if file.suffix not in {".h", ".cpp", ".cuh", ".cu"}:
                continue
            path = file.relative_to(root).as_posix()
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                match = INCLUDE.match(line)
                if match and (what := problem(path, *match.groups())):
                    yield f"{path}:{number}: {what}"


def main() -> int:
    """Prints every problem; 1 if there is one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2]
    found = list(problems(root))
    print("\n".join(found) or "every include points to its own layer or down")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
