"""One measured ratio beside what it must reach."""

from dataclasses import dataclass


@dataclass
class Result:
    """`at_most`: the target is an upper bound (memory, overhead) instead of a lower one."""

    name: str
    value: float
    target: float
    detail: str
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target
