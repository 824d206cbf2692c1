"""Sections of the report that show a training over time: bits, eigenvalues, curves."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from bitfall.report_chart import (
    Axis,
    Point,
    Series,
    doubling_axis,
    escape,
    line_chart,
    linear_axis,
    log_axis,
    number,
    smooth,
    step_axis,
    x_labels,
)
from bitfall.report_log import finite_points
from bitfall.report_page import details, section, table

if TYPE_CHECKING:
    from bitfall.report_log import TrainingLog

# Fewer bits, warmer: readable on light and on dark ground.
BIT_COLORS = {
    15: "#e3efd3",
    14: "#cfe6c8",
    13: "#b4dcc1",
    12: "#93cfbb",
    11: "#6bbfb9",
    10: "#41a5b6",
    9: "#2b83ac",
    8: "#2b5f98",
    7: "#3f4a92",
    6: "#563d8f",
    5: "#70358b",
    4: "#8c2f82",
    3: "#a92f73",
    2: "#c53a5d",
    1: "#d9503f",
}
NARROWEST_LABEL = 0.045  # share of the row below which a stretch shows no number
LARGEST_LEGEND = 6  # blocks; of deeper models every second, third, ... is named
METRIC_COLORS = ("var(--second)", "var(--third)", "var(--accent)")
NOISY = ("grad_norm", "tokens_per_second")
METRICS_NOT_DRAWN = ("loss", "runtime", "per_second", "samples", "epoch", "step")


def short_name(name: str) -> str:
    """ "bert.encoder.layer.3" -> "layer 3"; a leading "group/" stays."""
    match = re.fullmatch(r"(?:(.*)/)?(?:.*\.)?([A-Za-z_]+)\.(\d+)", name)
    if match is None:
        return name
    group = f"{match[1]}/" if match[1] else ""
    return f"{group}{match[2]} {match[3]}"


def bits_section(log: TrainingLog) -> str:
    """The heat map of bits, and the table of the steps at which widths began."""
    names = log.state_names()
    if not names:
        return ""
    axis = doubling_axis(log.last_step)
    rows = "".join(
        f'<span class="name" title="{escape(name)}">{escape(short_name(name))}</span>'
        f'<div class="row">{_bit_row(log, name, axis)}</div>'
        for name in names
    )
    used = sorted({bits for name in names for bits, _, _ in log.bit_runs(name)}, reverse=True)
    legend = "".join(
        f'<span class="key"><i style="background:{_bit_color(bits)}"></i>{_bit_label(bits)}</span>'
        for bits in used
    )
    heat_map = (
        f'<div class="bits">{rows}<span></span>{x_labels(axis)}</div><p class="legend">{legend}</p>'
    )
    return section(
        "Bits of every layer over time",
        "Each row is one layer, from the first step to the last on a logarithmic scale, because "
        "the periods between two widths double. A layer with a large eigenvalue is sensitive: it "
        "keeps its bits for longer. "
        '"other" holds everything outside the layers, such as embeddings and the head.',
        heat_map + details("Step at which each width began", _begin_table(log, names, used)),
    )


def _bit_color(bits: int) -> str:
    return BIT_COLORS.get(max(bits, 1), "var(--full)")


def _bit_label(bits: int) -> str:
    return f"{bits} bits" if bits < 16 else f"{bits} bits (not quantized below 16)"


def _bit_row(log: TrainingLog, name: str, axis: Axis) -> str:
    cells = []
    for bits, first, last in log.bit_runs(name):
        width = axis.share(last + 1) - axis.share(first)
        text = bits if width >= NARROWEST_LABEL else ""
        ink = "var(--ink)" if bits >= 16 else "#fff" if bits <= 9 else "#12202a"
        cells.append(
            f'<i style="flex:{width:.4f} 0 0;background:{_bit_color(bits)};color:{ink}" '
            f'title="{escape(name)}: {bits} bits, steps {first} to {last}">{text}</i>'
        )
    return "".join(cells)


def _begin_table(log: TrainingLog, names: list[str], widths: list[int]) -> str:
    rows = []
    for name in names:
        begins: dict[int, int] = {}
        for bits, first, _ in log.bit_runs(name):
            begins.setdefault(bits, first)
        rows.append([short_name(name), *(str(begins.get(bits, "-")) for bits in widths)])
    return table(["layer", *(f"{bits} bits" for bits in widths)], rows)


def eigenvalue_section(log: TrainingLog) -> str:
    """Eigenvalues of each block over time: relative to the largest, and absolute."""
    if not log.eigenvalues:
        return ""
    blocks = list(
        dict.fromkeys(block["name"] for event in log.eigenvalues for block in event["blocks"])
    )
    colors = {name: _depth_color(i, len(blocks)) for i, name in enumerate(blocks)}
    relative = _block_series(log, blocks, colors, "normalized")
    absolute = _block_series(log, blocks, colors, "value")
    x_axis = doubling_axis(log.last_step)
    charts = []
    if relative:
        quarters = Axis(0, 1, [0, 0.25, 0.5, 0.75, 1])
        note = "The period is stretched by f = 1 below 0.25, then 2, 3, 4, and 5 at 1."
        charts.append(line_chart("Relative to the largest", relative, x_axis, quarters, note))
    positive = [y for one in absolute for _, y in one.points if y > 0]
    if positive:
        y_axis = log_axis(min(positive), max(positive))
        charts.append(line_chart("Largest |eigenvalue|", absolute, x_axis, y_axis, _effort(log)))
    return section(
        "Eigenvalues",
        "The largest curvature of the loss along the weights of each layer, computed whenever a "
        "layer was about to lose a bit. Steps on a logarithmic scale, as above.",
        f'<div class="pair">{"".join(charts)}</div>' if charts else "",
    )


def _block_series(
    log: TrainingLog, blocks: list[str], colors: dict[str, str], key: str
) -> list[Series]:
    values: dict[str, list[tuple[int, Any]]] = {name: [] for name in blocks}
    for event in log.eigenvalues:
        for block in event["blocks"]:
            values[block["name"]].append((event["step"], block.get(key)))
    stride = math.ceil(len(blocks) / LARGEST_LEGEND)
    series = [
        Series(short_name(name), finite_points(values[name]), colors[name], "dots", i % stride == 0)
        for i, name in enumerate(blocks)
    ]
    return [one for one in series if one.points]


def _depth_color(index: int, count: int) -> str:
    """From violet (first block) through blue and green to orange (last)."""
    hue = 290 - 255 * index / max(count - 1, 1)
    return f"hsl({hue:.0f} 55% 50%)"


def _effort(log: TrainingLog) -> str:
    results = [block for event in log.eigenvalues for block in event["blocks"]]
    iterations = sum(block.get("iterations") or 0 for block in results)
    unconverged = sum(block.get("converged") is False for block in results)
    text = f"{len(log.eigenvalues)} computations, {iterations:,} iterations in all"
    return f"{text}; {unconverged} stopped at max_iter." if unconverged else f"{text}."


def curve_section(log: TrainingLog) -> str:
    """Loss, metrics, learning rate, loss scale, gradient norm and speed over the steps."""
    x_axis = step_axis(log.last_step)
    charts = [*_loss_chart(log, x_axis), *_metric_chart(log, x_axis)]
    constants = []
    for key, title, color in (
        ("learning_rate", "Learning rate", "var(--third)"),
        ("loss_scale", "Loss scale", "var(--second)"),
        ("grad_norm", "Gradient norm before clipping", "var(--accent)"),
        ("tokens_per_second", "Tokens per second", "var(--third)"),
    ):
        points = log.series(key)
        if len({y for _, y in points}) > 1:
            axis = linear_axis(0, max(y for _, y in points))
            series = [Series("", points, color)]
            if key in NOISY:
                series = [
                    Series("each step", points, color, "faint"),
                    Series("smoothed", smooth(points), color),
                ]
            charts.append(line_chart(title, series, x_axis, axis))
        elif points:
            constants.append(f"{title}: {number(points[0][1])} throughout.")
    note = f'<p class="note">{escape(" ".join(constants))}</p>' if constants else ""
    skipped = sum(bool(step.get("skipped")) for step in log.steps)
    explanation = "Per optimizer step." + (
        f" {skipped} steps overflowed and were skipped." if skipped else ""
    )
    body = f'<div class="pair">{"".join(charts)}</div>{note}' if charts else note
    return section("Training", explanation, body)


def _loss_chart(log: TrainingLog, x_axis: Axis) -> list[str]:
    points = log.series("loss")
    if len(points) < 2:
        return []
    series = [
        Series("each step", points, "var(--accent)", "faint"),
        Series("smoothed", smooth(points), "var(--accent)"),
    ]
    evaluated = _metric_points(log, "eval_loss")
    if evaluated:
        series.append(Series("evaluation", evaluated, "var(--second)", "dots"))
    return [line_chart("Loss", series, x_axis)]


def _metric_chart(log: TrainingLog, x_axis: Axis) -> list[str]:
    names = dict.fromkeys(name for event in log.evaluations for name in event["metrics"])
    drawn = [
        name
        for name in names
        if not any(name.split(" (")[0].endswith(word) for word in METRICS_NOT_DRAWN)
    ]
    series = []
    for index, name in enumerate(drawn):
        points = _metric_points(log, name)
        if len(points) > 1:
            color = METRIC_COLORS[index % len(METRIC_COLORS)]
            series.append(Series(name.removeprefix("eval_"), points, color, "dots"))
    return [line_chart("Metric on the evaluation data", series, x_axis)] if series else []


def _metric_points(log: TrainingLog, name: str) -> list[Point]:
    return finite_points((event["step"], event["metrics"].get(name)) for event in log.evaluations)
