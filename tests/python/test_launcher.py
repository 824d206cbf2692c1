"""`bitfall run`: a script sees what it would see under python, and deepspeed is bitfall's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment

MPI_AS_TESTED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


@pytest.fixture
def run(tmp_path: Path):
    """Runs `bitfall run [flags] script.py [words]` on the given source, in the script's folder."""

    def call(source: str, *words: str, flags: tuple[str, ...] = (), **variables: str | None):
        (tmp_path / "script.py").write_text(source)
        merged = environment() | MPI_AS_TESTED | variables
        return subprocess.run(
            [sys.executable, "-m", "bitfall", "run", *flags, "script.py", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={name: value for name, value in merged.items() if value is not None},
            check=False,
        )

    return call


@pytest.fixture
def two_ranks() -> tuple[str, ...]:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    pytest.importorskip("bitfall._core", reason="the C++ module is not built")
    return ("--np", "2")


def test_a_script_sees_its_own_arguments_folder_and_name(run, tmp_path: Path):
    (tmp_path / "neighbour.py").write_text("WORD = 'found'")
    done = run(
        "import sys, neighbour\nprint(__name__, neighbour.WORD, sys.argv)", "--help", "-x", "--np=3"
    )
    assert done.stdout == "__main__ found ['script.py', '--help', '-x', '--np=3']\n"
    assert done.returncode == 0


def test_a_script_without_deepspeed_loads_neither_torch_nor_the_engine(run):
    done = run("import sys\nprint({'torch', 'bitfall._core', 'deepspeed'} & set(sys.modules))")
    assert done.stdout == "set()\n"


def test_the_exit_code_is_the_scripts(run):
    assert run("raise SystemExit(7)").returncode == 7
    done = run("import sys; sys.exit('out of luck')")
    assert (done.returncode, done.stderr) == (1, "out of luck\n")


def test_an_error_has_pythons_traceback_from_the_script_on(run):
    done = run("def work():\n    raise OSError('no luck')\nwork()")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "script.py", line 3, in <module>'
    assert lines[-1] == "OSError: no luck"
    assert "launcher.py" not in done.stderr


def test_warnings_of_the_script_look_as_under_python(run):
    done = run("import warnings; warnings.warn('careful')")
    assert "script.py:1: UserWarning: careful" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.py"], "no file 'missing.py': expected a Python script after 'bitfall run'"),
        (["--np", "0", "script.py"], "argument --np: '0': expected a number of processes"),
        (["--np", "two", "script.py"], "argument --np: 'two': expected a number of processes"),
        ([], "the following arguments are required: SCRIPT; see 'bitfall run --help'"),
        (["--nodes", "2", "script.py"], "unknown argument '--nodes'"),
    ],
)
def test_wrong_use_is_named(words: list[str], message: str, capsys):
    from bitfall.cli import main

    assert main(["run", *words]) == 1
    assert message in capsys.readouterr().err


def test_processes_need_mpirun(run, tmp_path: Path):
    done = run("", flags=("--np", "2"), PATH=str(tmp_path))
    assert done.returncode == 1
    assert "--np 2 needs mpirun, which is not on the PATH: install openmpi-bin" in done.stderr


def test_other_launchers_are_refused_before_every_process_trains_alone(run):
    done = run("print('trained')", WORLD_SIZE="2", RANK="0")
    assert done.stdout == ""
    assert "'bitfall run --np 2'" in done.stderr


def test_ranks_are_described_to_torch_distributed(run, two_ranks):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    source = (
        "import os, socket\n"
        "listening = socket.create_server(('', int(os.environ['MASTER_PORT'])), reuse_port=True)\n"
        # One piece: mpirun mixes what two ranks write.
        f"os.write(1, (' '.join(os.environ[name] for name in {names}) + '\\n').encode())\n"
    )
    done = run(source, flags=two_ranks)
    assert sorted(done.stdout.split("\n")) == ["", "0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def test_ranks_share_the_cores(run, two_ranks):
    source = "import os; print(os.environ['OMP_NUM_THREADS'])"
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    done = run(source, flags=two_ranks, OMP_NUM_THREADS=None)
    assert sorted(done.stdout) == sorted(f"{share}\n{share}\n")  # mpirun may mix their lines
    done = run(source, flags=two_ranks, OMP_NUM_THREADS="3")
    assert sorted(done.stdout) == sorted("3\n3\n")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raise ValueError('broken here')", "rank 1 of 2: ValueError: broken here"),
        ("raise SystemExit(3)", "rank 1 of 2: script.py: exit code 3"),
        ("raise SystemExit('bad news')", "rank 1 of 2: bad news"),
    ],
)
def test_an_error_in_one_rank_ends_all(run, two_ranks, failure: str, message: str):
    began = time.monotonic()
    source = (
        "import os, time\n"
        f"if os.environ['RANK'] == '1':\n    {failure}\n"
        "time.sleep(60)\nprint('went on')"
    )
    done = run(source, flags=two_ranks)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""
    assert time.monotonic() - began < 30


def test_processes_cannot_be_started_twice(run, two_ranks):
    done = run("", flags=("--np", "2"), OMPI_COMM_WORLD_SIZE="2")
    assert "--np inside mpirun" in done.stderr


PROBE = """
import importlib.util, importlib.metadata as metadata
print(importlib.util.find_spec("deepspeed").origin.split("/")[-2])
print(metadata.version("deepspeed"), metadata.metadata("DeepSpeed")["Name"])
"""


def test_deepspeed_is_found_as_module_and_as_distribution(run):
    done = run(PROBE)
    assert done.stdout == "deepspeed_shim\n0.19.6+bitfall deepspeed\n", done.stderr


def test_a_real_deepspeed_is_hidden_and_stays_as_it_is(run, tmp_path: Path):
    site = tmp_path / "site"
    (site / "deepspeed").mkdir(parents=True)
    (site / "deepspeed" / "__init__.py").write_text("print('the real one')")
    (site / "deepspeed-0.1.dist-info").mkdir()
    (site / "deepspeed-0.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.1\n")
    path = f"{environment()['PYTHONPATH']}{os.pathsep}{site}"
    assert run(PROBE, PYTHONPATH=path).stdout == "deepspeed_shim\n0.19.6+bitfall deepspeed\n"
    plain = subprocess.run(
        [sys.executable, "-c", PROBE + "import deepspeed"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
    assert plain.stdout == "deepspeed\n0.1 deepspeed\nthe real one\n"


def test_an_imported_deepspeed_cannot_be_replaced(monkeypatch):
    from types import SimpleNamespace

    from bitfall import deepspeed_import
    from bitfall.errors import InputError

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__file__="/real/deepspeed.py"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    with pytest.raises(InputError, match=r"imported already, from /real/deepspeed\.py"):
        deepspeed_import.install()
