"""Sums the results of every runner of test.sh: "N passed, N failed, N skipped"; 1 if any failed.

Each stage leaves NAME.status (its exit code) in the results folder, and NAME.xml (JUnit) if it has
one. A ctest entry that is a GoogleTest binary counts with the cases that it prints, any other stage
or entry as one.
"""

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

GTEST_LINE = re.compile(r"^\[\s+(PASSED|SKIPPED|FAILED)\s+\] (\d+) tests?[.,]", re.MULTILINE)


def count_case(case: ET.Element) -> Counter[str]:
    """Counts one JUnit <testcase>."""
    if case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
        return Counter(skipped=1)
    failed = case.find("failure") is not None or case.find("error") is not None
    counts: Counter[str] = Counter()
    for outcome, number in GTEST_LINE.findall(case.findtext("system-out") or ""):
        # mpirun prints the line once per rank: the cases are the same.
        counts[outcome.lower()] = max(counts[outcome.lower()], int(number))
    if not failed:
        return counts if counts["passed"] + counts["skipped"] else Counter(passed=1)
    counts["failed"] = max(counts["failed"], 1)
    return counts


def count_stage(status: Path) -> Counter[str]:
    """Counts one stage from its exit code and its JUnit file."""
    counts: Counter[str] = Counter()
    junit = status.with_suffix(".xml")
    if junit.exists():
        for case in ET.parse(junit).getroot().iter("testcase"):
            counts += count_case(case)
    failed = status.read_text(encoding="utf-8").strip() != "0"
    if failed and not counts["failed"]:
        counts["failed"] = 1
    elif not counts.total():
        counts["passed"] = 1
    return counts


def main() -> int:
    """Prints one line per stage and the closing line."""
    total: Counter[str] = Counter()
    for status in sorted(Path(sys.argv[1]).glob("*.status")):
        counts = count_stage(status)
        total += counts
        print(f"{status.stem:20} {counts['passed']:6} {counts['failed']:6} {counts['skipped']:6}")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
