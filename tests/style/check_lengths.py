"""Fails on a file above 400 lines or a function above 60 lines.

C++ functions are found by their layout, which clang-format guarantees: a line that opens a body
ends with "{", and the body ends at the first "}" with the indentation of the first line.

usage: check_lengths.py [ROOT]
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FOLDERS = (
    "core",
    "quantizer",
    "eigen_sched",
    "csrc_cpu",
    "csrc_cuda",
    "engine",
    "python",
    "scripts",
    "tests",
    "benchmarks",
)
CPP_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
# A statement at namespace or class level that opens no function body.
NOT_A_FUNCTION = re.compile(
    r"^\s*(namespace|class|struct|enum|union|extern|typedef|using|#|//|\}|public:|private:)"
)


def cpp_functions(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yields (first line, number of lines) of each function at namespace or class level, from 1."""
    start = 0
    while start < len(lines):
        line = lines[start]
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent > 2 or NOT_A_FUNCTION.match(line):
            start += 1
            continue
        opening = start
        while opening < len(lines) and not lines[opening].rstrip().endswith(("{", ";", "}", ":")):
            opening += 1
        end = opening
        if opening < len(lines) and lines[opening].rstrip().endswith("{"):
            closing = " " * indent + "}"
            while end < len(lines) - 1 and not lines[end].startswith(closing):
                end += 1
            if any("(" in part for part in lines[start : opening + 1]):
                yield start + 1, end - start + 1
        start = end + 1


def python_functions(text: str) -> Iterator[tuple[int, int]]:
    """Yields (first line, number of lines) of each function, its docstring not counted."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        yield node.lineno, length


def problems(root: Path) -> Iterator[str]:
    """Yields "file:line: what" for everything that is too long."""
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix not in CPP_SUFFIXES | {".py"} or "__pycache__" in file.parts:
                continue
            text = file.read_text(encoding="utf-8")
            lines = text.splitlines()
            path = file.relative_to(root).as_posix()
            if len(lines) > MAX_FILE_LINES:
                yield f"{path}:1: {len(lines)} lines, at most {MAX_FILE_LINES}: split it"
            functions = python_functions(text) if file.suffix == ".py" else cpp_functions(lines)
            for first, length in functions:
                if length > MAX_FUNCTION_LINES:
                    what = f"{length} lines in a function, at most {MAX_FUNCTION_LINES}"
                    yield f"{path}:{first}: {what}"


def main() -> int:
    """Prints every problem; 1 if there is one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2]
    found = list(problems(root))
    print("\n".join(found) or "no file and no function is too long")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
