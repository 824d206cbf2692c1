"""The table of bits by step, and the warning when the target width is out of reach.

Used before training (`bitfall glue`) and without it (`bitfall schedule`). The steps come from
`bitfall._core.plan_bits`, whose drops name the first optimizer step (counted from 1) at each width.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from bitfall import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitfall._core import CompletedConfig, PlannedState

DEFAULT_LAYER_NAME = "bert.encoder.layer"
SMALLEST_FACTOR_EIGENVALUE = 0.0  # f = 1 + floor(4 * 0) = 1
LARGEST_FACTOR_EIGENVALUE = 1.0  # f = 1 + floor(4 * 1) = 5
# Later than any training: `plan_bits` names a larger step for a width that never begins.
LAST_STEP = 10**15
NEVER = "-"  # its cell in the table


def configured_layer_name(config: CompletedConfig) -> str:
    """The path of the blocks: eigenvalue.layer_name, at top level or in quantize_training."""
    completed = json.loads(config.json)
    nested = completed.get("quantize_training", {}).get("eigenvalue", {})
    section = completed.get("eigenvalue", nested)
    return section.get("layer_name", DEFAULT_LAYER_NAME)


def plans_before_training(config: CompletedConfig, num_layers: int) -> list[PlannedState]:
    """States under the smallest and (eigenvalues on) the largest factor that a block can get.

    The states of the largest factor follow those of the smallest; a state that has the same factor
    in both ("other") is listed once. Factors are 1 for all without eigenvalues.
    """
    layer_name = configured_layer_name(config)
    if not config.eigenvalue_enabled:
        return _core.plan_bits(config, num_layers, None, layer_name)
    fastest = _core.plan_bits(
        config, num_layers, [SMALLEST_FACTOR_EIGENVALUE] * num_layers, layer_name
    )
    slowest = _core.plan_bits(
        config, num_layers, [LARGEST_FACTOR_EIGENVALUE] * num_layers, layer_name
    )
    return fastest + [state for state in slowest if state["block"] >= 0]


def format_plan(
    states: Sequence[PlannedState], total_steps: int | None = None, merge_equal: bool = True
) -> str:
    """One line per state: name, factor f, and the step at which each width begins.

    With `merge_equal`, neighbouring blocks with the same plan share a line. Steps beyond
    `total_steps` stand in parentheses: training ends before them. A dash is a width that never
    begins; a last line says so where there is one.
    """
    rows = _merged(states) if merge_equal else [(state["name"], state) for state in states]
    widths = sorted({bits for state in states for bits, _ in state["drops"]}, reverse=True)
    table = [["state", "f", *(f"{bits} bits" for bits in widths)]]
    for name, state in rows:
        first_steps = dict(state["drops"])
        cells = [_step_cell(first_steps.get(bits), total_steps) for bits in widths]
        table.append([name, str(state["factor"]), *cells])
    column_widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        row[0].ljust(column_widths[0])
        + "".join(
            f"  {cell:>{width}}" for cell, width in zip(row[1:], column_widths[1:], strict=True)
        )
        for row in table
    ]
    if any(NEVER in row[2:] for row in table):
        lines.append(f"{NEVER}  never begins, however long training runs")
    return "\n".join(lines)


def unreachable_targets(
    config: CompletedConfig, states: Sequence[PlannedState], num_layers: int, total_steps: int
) -> list[str]:
    """One warning per (group, factor) whose target_bits lies beyond `total_steps`.

    Each names the largest quantize_period that reaches the target at that factor, if there is one.
    """
    late: dict[tuple[int, int], list[PlannedState]] = {}
    for state in states:
        if state["drops"] and state["drops"][-1][1] > total_steps:
            late.setdefault((state["group"], state["factor"]), []).append(state)
    warnings = []
    for (group, factor), group_states in late.items():
        target, step = group_states[0]["drops"][-1]
        reached = min(
            (bits for bits, first in group_states[0]["drops"] if first <= total_steps),
            default=None,
        )
        end = f"training ends after {total_steps} steps at " + (
            f"{reached} bits" if reached is not None else "full precision"
        )
        period = _core.longest_period_that_reaches(config, group, num_layers, factor, total_steps)
        advice = (
            f"a quantize_period of {period} or less reaches it"
            if period > 0
            else "no quantize_period reaches it: lower start_bits or the offset, or train longer"
        )
        names = _join_names([state["name"] for state in group_states])
        begins = f"begins at step {step}" if step <= LAST_STEP else "never begins"
        warnings.append(
            f"target_bits {target} is out of reach for {names} at f = {factor}: it {begins},"
            f" {end}; {advice}"
        )
    return warnings


def _step_cell(step: int | None, total_steps: int | None) -> str:
    if step is None:  # a state of another group, which starts or ends at other widths
        return ""
    if step > LAST_STEP:
        return NEVER
    return f"({step})" if total_steps is not None and step > total_steps else str(step)


def _merged(states: Sequence[PlannedState]) -> list[tuple[str, PlannedState]]:
    groups: list[list[PlannedState]] = []
    for state in states:
        last = groups[-1][-1] if groups else None
        if (
            last
            and last["block"] + 1 == state["block"]
            and last["factor"] == state["factor"]
            and last["drops"] == state["drops"]
            and last["block"] >= 0
        ):
            groups[-1].append(state)
        else:
            groups.append([state])
    return [(_join_names([state["name"] for state in group]), group[0]) for group in groups]


def _join_names(names: Sequence[str]) -> str:
    """Blocks as "layer.0..5", anything else by its name."""
    blocks = [name for name in names if re.search(r"\d+$", name)]
    parts = [name for name in names if name not in blocks]
    if len(blocks) > 1:
        last_number = blocks[-1].rsplit(".", 1)[-1]
        parts.insert(0, f"{blocks[0]}..{last_number}")
    else:
        parts = blocks + parts
    return " and ".join(parts)
