"""`bitfall schedule test.json`: the step at which each width of every layer begins."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall.arguments import GlueArguments
from bitfall.errors import ArgumentsError
from bitfall.outputs import read_json_object

if TYPE_CHECKING:
    from bitfall._core import CompletedConfig, PlannedState

DEFAULT_NUM_LAYERS = 12  # BERT base

EXAMPLES = """examples:
  bitfall schedule test.json --layers 12 --steps 345
  bitfall schedule test.json --model bert-base-cased/ --eigenvalues 0.1,0.9,0.3,0.2,1,0.5
Steps count from 1. Without --eigenvalues, a config with eigenvalues shows the fastest case (f = 1)
and the slowest (f = 5); the true factors are known only in training."""


@dataclass(frozen=True)
class Plan:
    """What was planned, and for how many layers."""

    config: CompletedConfig
    states: list[PlannedState]
    num_layers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bitfall schedule`."""
    parser.epilog = EXAMPLES
    parser.add_argument("config", help="DeepSpeed JSON config")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--model", metavar="DIR", help="take the number of layers from this model")
    layers.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="number of layers (default: eigenvalue.layer_num, one per --eigenvalues, or 12)",
    )
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="planned optimizer steps: warns what is late"
    )
    parser.add_argument(
        "--eigenvalues", type=_eigenvalues, metavar="X,X,...", help="one per layer, each in [0, 1]"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def main(args: argparse.Namespace) -> int:
    """Prints the table with its warnings, or JSON. Raises ConfigError and ArgumentsError."""
    plan = make_plan(args)
    if args.json:
        print(json.dumps(as_json(plan, args.steps), indent=2))
    else:
        print_plan(plan, args.steps)
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan for the arguments of the command."""
    from bitfall import _core
    from bitfall.flag_values import complete_config
    from bitfall.plan_table import configured_layer_name, plans_before_training

    arguments = GlueArguments(deepspeed=args.config)
    config, _ = complete_config(arguments, 1, lambda _: args.steps or 1)
    if not config.quantize_enabled:
        raise ArgumentsError(
            f"{args.config}: quantization is off, so there is no schedule;"
            ' write "quantize_training": {"enabled": true, ...}'
        )
    num_layers = _num_layers(args, config)
    if args.eigenvalues is None:
        return Plan(config, plans_before_training(config, num_layers), num_layers)
    if not config.eigenvalue_enabled:
        raise ArgumentsError(
            f"--eigenvalues: eigenvalue.enabled is not true in {args.config};"
            " drop the flag, or switch eigenvalues on"
        )
    if len(args.eigenvalues) != num_layers:
        raise ArgumentsError(
            f"--eigenvalues: {len(args.eigenvalues)} values for {num_layers} layers;"
            " give one per layer"
        )
    layer_name = configured_layer_name(config)
    states = _core.plan_bits(config, num_layers, args.eigenvalues, layer_name)
    return Plan(config, states, num_layers)


def as_json(plan: Plan, steps: int | None) -> dict[str, Any]:
    """Clock, first quantized step (None if it never comes), and per state the drops up to `steps`,
    without it all that ever come."""
    from bitfall.plan_table import LAST_STEP

    last = LAST_STEP if steps is None else steps
    begins_at_step = min(state["drops"][0][1] for state in plan.states)
    return {
        "clock": clock(plan.config),
        "begins_at_step": begins_at_step if begins_at_step <= LAST_STEP else None,
        "states": [
            {
                "name": state["name"],
                "factor": state["factor"],
                "drops": [
                    {"step": step, "bits": bits}
                    for bits, step in state["drops"][1:]
                    if step <= last
                ],
            }
            for state in plan.states
        ],
    }


def print_plan(plan: Plan, steps: int | None) -> None:
    """Prints clock, table and warnings."""
    from bitfall.plan_table import format_plan, unreachable_targets

    print(f"clock {clock(plan.config)}; first optimizer step at each width:\n")
    print(format_plan(plan.states, steps))
    for warning in plan.config.warnings:
        print(f"\nwarning: {warning}")
    if steps is not None:
        for warning in unreachable_targets(plan.config, plan.states, plan.num_layers, steps):
            print(f"\nwarning: {warning}")


def clock(config: CompletedConfig) -> str:
    """The unit in which quantize_period counts; "step" unless quantize_schedule.clock says so."""
    training = json.loads(config.json).get("quantize_training", {})
    return training.get("quantize_schedule", {}).get("clock", "step")


def _num_layers(args: argparse.Namespace, config: CompletedConfig) -> int:
    if args.layers:
        return args.layers
    if args.model:
        path = Path(args.model) / "config.json"
        layers = read_json_object(path).get("num_hidden_layers")
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise ArgumentsError(f"{path}: num_hidden_layers = {layers!r}: expected 1 or more")
        return layers
    completed = json.loads(config.json)
    nested = completed.get("quantize_training", {}).get("eigenvalue", {})
    configured = completed.get("eigenvalue", nested).get("layer_num", 0)
    return configured or len(args.eigenvalues or ()) or DEFAULT_NUM_LAYERS


def _positive(text: str) -> int:
    from bitfall.plan_table import LAST_STEP

    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= LAST_STEP:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number, 1 or more")
    return value


def _eigenvalues(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers in [0, 1], like 0.1,0.9")
    return values
