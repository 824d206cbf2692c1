"""What a training says before its first step: the plan of bits, and the log's start event."""

from __future__ import annotations

import datetime
import json
import sys
from typing import TYPE_CHECKING, Any

from bitfall import _core
from bitfall.plan_table import (
    configured_layer_name,
    format_plan,
    plans_before_training,
    unreachable_targets,
)

if TYPE_CHECKING:
    from bitfall._core import CompletedConfig, PlannedState
    from bitfall.batches import BatchPlan
    from bitfall.problem import Problem
    from bitfall.progress import Progress


def show_plan(
    progress: Progress,
    config: CompletedConfig,
    problem: Problem,
    plan: BatchPlan,
    total_steps: int,
    num_layers: int,
) -> list[PlannedState]:
    """Prints sizes, the step at which each width begins, and a warning for targets out of reach.

    Returns the planned states: for f = 1, and for f = 5 too where eigenvalues will decide.
    """
    progress.message(
        f"{problem.name}: {plan.num_examples} training examples, {total_steps} steps of"
        f" {plan.train_batch_size}, {config.compute_dtype}"
    )
    if not config.quantize_enabled:
        return []
    states = plans_before_training(config, num_layers)
    progress.message("bits by optimizer step (in parentheses: after the end of training)")
    progress.message(format_plan(states, total_steps))
    for text in unreachable_targets(config, states, num_layers, total_steps):
        progress.message(f"warning: {text}")
    return states


def start_event(
    config: CompletedConfig,
    problem: Problem,
    plan: BatchPlan,
    states: list[PlannedState],
    total_steps: int,
    world_size: int,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Fields of the log's first line, see training_log.py."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": _core.__version__,
        "command": sys.argv,
        "model": model,
        "task": problem.name,
        "labels": problem.labels,
        "world_size": world_size,
        "train_samples": plan.num_examples,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": total_steps,
        "layer_name": configured_layer_name(config),
        "config": json.loads(config.json),
        "origins": config.origins,
        "warnings": config.warnings,
        "plan": states,
    }
