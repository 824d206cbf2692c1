"""Fails if a kernel object of any instruction set defines a weak symbol.

The linker keeps one copy of a weak symbol. If it kept the AVX-512 copy of a helper, the generic
kernels would call it, and stop on a CPU without AVX-512.

usage: check_isa_objects.py NM OBJECT [OBJECT ...]
"""

import re
import subprocess
import sys
from pathlib import Path

# "name kind value size" with --portability; a demangled name may hold blanks.
SYMBOL = re.compile(r"^(?P<name>.+) (?P<kind>[A-Za-z])( [0-9a-f]*)*$")


def weak_symbols(nm: str, path: Path) -> list[str]:
    """Demangled names of the weak symbols that `path` defines."""
    command = [nm, "--defined-only", "--demangle", "--portability", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    matches = (SYMBOL.match(line) for line in text.splitlines())
    return [match["name"] for match in matches if match and match["kind"] in "WVwvu"]


def main(arguments: list[str]) -> int:
    """Prints each weak symbol; returns the exit status."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    nm, *objects = arguments
    bad = 0
    for path in map(Path, objects):
        for name in weak_symbols(nm, path):
            print(f"{path.parent.name}/{path.name}: weak symbol {name}")
            bad += 1
    if bad:
        print(f"{bad} weak symbols: use builtins or BITFALL_INLINE helpers in kernel sources")
        return 1
    print(f"{len(objects)} kernel objects, no weak symbol")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
