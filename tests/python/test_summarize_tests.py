"""The sum over all runners that scripts/test.sh ends with."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "summarize_tests.py"
PYTEST = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>
<testcase name="c"/></testsuite></testsuites>"""
FAILED = '<testsuite><testcase name="a"><failure/></testcase><testcase name="b"/></testsuite>'
GTEST = """<testsuite><testcase name="unit" status="run"><system-out>
[  PASSED  ] 7 tests.
[  SKIPPED ] 2 tests, listed below:
</system-out></testcase><testcase name="mpi" status="run"><system-out>
[  PASSED  ] 3 tests.
[  PASSED  ] 3 tests.
</system-out></testcase><testcase name="style" status="run"/></testsuite>"""
GTEST_FAILED = """<testsuite><testcase name="unit" status="fail"><failure/><system-out>
[  PASSED  ] 7 tests.
[  FAILED  ] 2 tests, listed below:
</system-out></testcase></testsuite>"""


def summarize(folder, stages):
    for name, (status, junit) in stages.items():
        (folder / f"{name}.status").write_text(f"{status}\n", encoding="utf-8")
        if junit is not None:
            (folder / f"{name}.xml").write_text(junit, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False
    )
    return result.returncode, (result.stdout.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"build": (0, None), "pytest": (0, PYTEST)}, (0, "3 passed, 0 failed, 1 skipped")),
        ({"ctest": (0, GTEST)}, (0, "11 passed, 0 failed, 2 skipped")),
        ({"ctest": (1, GTEST_FAILED)}, (1, "7 passed, 2 failed, 0 skipped")),
        ({"pytest": (1, FAILED)}, (1, "1 passed, 1 failed, 0 skipped")),
        # A runner that crashed after good tests, or before any, has failed.
        ({"pytest": (1, PYTEST)}, (1, "2 passed, 1 failed, 1 skipped")),
        ({"build": (1, None)}, (1, "0 passed, 1 failed, 0 skipped")),
        ({}, (1, "0 passed, 0 failed, 0 skipped")),
    ],
)
def test_sum_and_exit_code(tmp_path, stages, expected):
    assert summarize(tmp_path, stages) == expected
