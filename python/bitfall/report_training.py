"""Sections of the report that show a training over time: bits, eigenvalues, curves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bitfall.report_chart import (
    Axis,
    Point,
    Series,
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
    15: "#d3e6ee",
    14: "#bcdbe7",
    13: "#a2cedf",
    12: "#85bfd6",
    11: "#65adcb",
    10: "#4598bf",
    9: "#2f80b0",
    8: "#24669d",
    7: "#334f97",
    6: "#493f96",
    5: "#633793",
    4: "#7f318b",
    3: "#9e2d7c",
    2: "#c03362",
    1: "#d94a38",
}
NARROWEST_LABEL = 0.045  # share of the row below which a stretch shows no number
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
    axis = Axis(0, log.last_step, step_axis(log.last_step).ticks)
    rows = "".join(
        f'<span class="name" title="{escape(name)}">{escape(short_name(name))}</span>'
        f'<div class="row">{_bit_row(log, name)}</div>'
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
        "Each row is one layer, from the first training step on the left to the last on the right. "
        "A layer with a large eigenvalue is sensitive: it keeps its bits for longer. "
        '"other" holds everything outside the layers, such as embeddings and the head.',
        heat_map + details("Step at which each width began", _begin_table(log, names, used)),
    )


def _bit_color(bits: int) -> str:
    return BIT_COLORS.get(max(bits, 1), "var(--full)")


def _bit_label(bits: int) -> str:
    return f"{bits} bits" if bits < 16 else f"{bits} bits (not quantized below 16)"


def _bit_row(log: TrainingLog, name: str) -> str:
    runs = log.bit_runs(name)
    before = runs[0][1] - 1
    cells = [f'<i style="flex:{before} 0 0"></i>'] if before > 0 else []
    for bits, first, last in runs:
        steps = last - first + 1
        text = bits if steps >= NARROWEST_LABEL * log.last_step else ""
        ink = "var(--ink)" if bits >= 16 else "#fff" if bits <= 10 else "#12202a"
        cells.append(
            f'<i style="flex:{steps} 0 0;background:{_bit_color(bits)};color:{ink}" '
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
    x_axis = step_axis(log.last_step)
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
        "layer was about to lose a bit.",
        f'<div class="pair">{"".join(charts)}</div>' if charts else "",
    )


def _block_series(
    log: TrainingLog, blocks: list[str], colors: dict[str, str], key: str
) -> list[Series]:
    values: dict[str, list[tuple[int, Any]]] = {name: [] for name in blocks}
    for event in log.eigenvalues:
        for block in event["blocks"]:
            values[block["name"]].append((event["step"], block.get(key)))
    series = [
        Series(short_name(name), finite_points(values[name]), colors[name], "dots")
        for name in blocks
    ]
    return [one for one in series if one.points]


def _depth_color(index: int, count: int) -> str:
    """From violet (first block) to yellow-green (last), of one lightness."""
    hue = 285 - 210 * index / max(count - 1, 1)
    return f"hsl({hue:.0f} 62% 52%)"


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
            charts.append(line_chart(title, [Series("", points, color)], x_axis, axis))
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
    drawn = [name for name in names if not any(name.endswith(word) for word in METRICS_NOT_DRAWN)]
    series = []
    for index, name in enumerate(drawn):
        points = _metric_points(log, name)
        if len(points) > 1:
            color = f"hsl({(25 + 75 * index) % 360} 62% 50%)"
            series.append(Series(name.removeprefix("eval_"), points, color, "dots"))
    return [line_chart("Metric on the evaluation data", series, x_axis)] if series else []


def _metric_points(log: TrainingLog, name: str) -> list[Point]:
    return finite_points((event["step"], event["metrics"].get(name)) for event in log.evaluations)
