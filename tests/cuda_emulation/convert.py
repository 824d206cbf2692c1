"""Turns what only nvcc reads in a CUDA source into C++ for the emulator: launches, shared memory.

usage: convert.py SOURCE RESULT
"""

import re
import sys
from pathlib import Path

SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
LAUNCH = re.compile(r"(\w[\w:]*(?:<[\w, ]+>)?)\s*<<<(.*?)>>>\(", re.DOTALL)


def convert(source: str) -> str:
    """`kernel<T><<<grid, block, bytes, stream>>>(` becomes a call of emulator::launch."""
    shared = r"\1* const \2 = static_cast<\1*>(emulator::dynamic_shared_memory());"
    source = SHARED.sub(shared, source)
    source, launches = LAUNCH.subn(r"emulator::launch(\1, \2, ", source)
    if "<<<" in source:
        raise ValueError(f"a launch of another form than the {launches} understood ones")
    return source


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    Path(sys.argv[2]).write_text(convert(text), encoding="utf-8")
