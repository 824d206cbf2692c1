"""The style checks find what they are for, and the project passes them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(check: str, root: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tests" / "style" / f"check_{check}.py"
    return subprocess.run(
        [sys.executable, str(script), str(root)], capture_output=True, text=True, check=False
    )


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("check", ["layers", "lengths"])
def test_project_passes(check):
    result = run(check, ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("core/a.h", '#include "engine/config.h"'),
        ("quantizer/a.cpp", '#include "csrc_cpu/cpu_isa.h"'),
        ("csrc_cpu/kernels/a.cpp", '#include "quantizer/quantizer.h"'),
        ("engine/a.cpp", '#include "config.h"'),
        ("engine/a.cpp", "#include <pybind11/pybind11.h>"),
        ("quantizer/a.cpp", "#  include <nlohmann/json.hpp>"),
        ("engine/a.cpp", "#include <mpi.h>"),
    ],
)
def test_wrong_include_is_found(tmp_path, path, include):
    write(tmp_path / path, f"#pragma once\n{include}\n")
    result = run("layers", tmp_path)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("engine/a.cpp", '#include "core/tensor.h"'),
        ("csrc_cpu/a.cpp", '#include "quantizer/quant_math.h"'),
        ("engine/a.cpp", "#include <nlohmann/json.hpp>"),
        ("python/bindings/a.cpp", "#include <pybind11/pybind11.h>"),
    ],
)
def test_right_include_passes(tmp_path, path, include):
    write(tmp_path / path, include)
    assert run("layers", tmp_path).returncode == 0


def cpp_function(signature: str, lines: int) -> str:
    return signature + " {\n" + "  step();\n" * (lines - 2) + "}\n"


def test_long_cpp_function_is_found(tmp_path):
    text = (
        "namespace bitfall {\n\n"
        + cpp_function("void fits(int x)", 60)
        + "\n"
        + cpp_function("int Long::name(int x,\n               int y)", 61)
        + "\n}  // namespace bitfall\n"
    )
    write(tmp_path / "core/a.cpp", text)
    result = run("lengths", tmp_path)
    assert result.returncode == 1
    assert result.stdout == "core/a.cpp:64: 62 lines in a function, at most 60\n"


def test_long_python_function_is_found_without_its_docstring(tmp_path):
    body = "    x = 1\n"
    docstring = '    """One.\n\n' + "    More.\n" * 30 + '    """\n'
    write(tmp_path / "python/a.py", "def fits():\n" + docstring + body * 59)
    assert run("lengths", tmp_path).returncode == 0
    write(tmp_path / "python/b.py", "def long():\n" + body * 60)
    assert "python/b.py:1: 61 lines" in run("lengths", tmp_path).stdout


def test_long_file_is_found(tmp_path):
    write(tmp_path / "core/a.h", "int x;\n" * 401)
    assert "core/a.h:1: 401 lines" in run("lengths", tmp_path).stdout
