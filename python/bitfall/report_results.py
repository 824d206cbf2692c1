"""Sections of the report that show what came out: tiles, metrics, errors, sizes, configuration."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bitfall.check import flatten
from bitfall.report_chart import escape, number
from bitfall.report_page import details, section, table

if TYPE_CHECKING:
    from bitfall.report_log import TrainingLog

LAYER_PARAMETER = re.compile(r".*?\.?([A-Za-z_]+)\.(\d+)\.(.+?)(?:\.weight)?")
HEADLINE_METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "loss")


def tiles(log: TrainingLog) -> str:
    """The numbers at the top of the page."""
    shown = _headline_metrics(log)
    sizes = _sizes(log)
    if sizes:
        before, after = (sum(size[key] for size in sizes.values()) for key in _BYTES)
        weighted = sum(size["numel"] * size["bits"] for size in sizes.values())
        elements = sum(size["numel"] for size in sizes.values())
        shown.append(("bits per weight", number(round(weighted / max(elements, 1), 2))))
        shown.append((f"size, {megabytes(before)} in f32", megabytes(after)))
    if log.steps:
        shown.append(("optimizer steps", f"{log.last_step:,}"))
    speeds = [speed for _, speed in log.series("tokens_per_second")]
    if speeds:
        shown.append(("tokens/s (median)", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in shown
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


_BYTES = ("bytes_f32", "bytes_quantized")


def megabytes(count: float) -> str:
    """Bytes in MB (1,000,000 bytes)."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _headline_metrics(log: TrainingLog) -> list[tuple[str, str]]:
    if not log.evaluations:
        return []
    metrics = log.evaluations[-1]["metrics"]
    by_name = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    found = [name for name in HEADLINE_METRICS if isinstance(by_name.get(name), int | float)]
    return [(name.replace("_", " "), f"{by_name[name]:.4f}") for name in found[:2]]


def metric_section(log: TrainingLog) -> str:
    """Every metric of the last evaluation of each kind, with earlier ones for comparison."""
    if not log.evaluations:
        return ""
    shown = log.evaluations[-8:]
    names = dict.fromkeys(name for event in shown for name in event["metrics"])
    rows = [
        [name, *(_metric_text(event["metrics"].get(name)) for event in shown)] for name in names
    ]
    header = ["metric", *(f"step {event['step']}" for event in shown)]
    return section(
        "Metrics", "On the evaluation data; the last column is final.", table(header, rows)
    )


def _metric_text(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4f}" if abs(value) < 2 else number(value)
    return "-" if value is None else str(value)


def error_section(log: TrainingLog) -> str:
    """Quantization error: a matrix of layers by weight, and a list of the rest."""
    errors = _dict_of(log, "quantization_error", (int, float))
    if not errors:
        return ""
    largest = max(errors.values()) or 1.0
    layers: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    others: dict[str, float] = {}
    for name, error in errors.items():
        match = LAYER_PARAMETER.fullmatch(name)
        if match:
            layers[(match[1], int(match[2]))][match[3]] = error
        else:
            others[name.removesuffix(".weight")] = error
    columns = list(dict.fromkeys(column for row in layers.values() for column in row))
    rows = {
        f"{name} {index}": [row.get(column) for column in columns]
        for (name, index), row in sorted(layers.items())
    }
    body = _matrix(columns, rows, largest) if rows else ""
    if others:
        body += _matrix(["other weights"], {name: [e] for name, e in others.items()}, largest)
    return section(
        "Quantization error per layer",
        "How far the quantized weights are from the trained ones: |quantized - master| / |master|. "
        "Darker is larger.",
        body,
    )


def _matrix(columns: list[str], rows: dict[str, list[float | None]], largest: float) -> str:
    head = "".join(f"<th>{escape(_wrap(column))}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(_cell(error, largest) for error in row) + "</tr>"
        for name, row in rows.items()
    )
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _wrap(column: str) -> str:
    return column.replace(".dense", "").replace("attention.self.", "").replace(".", " ")


def _cell(error: float | None, largest: float) -> str:
    if error is None or not math.isfinite(error):
        return "<td>-</td>"
    shade = 0.06 + 0.64 * error / largest
    return f'<td style="background:rgba(var(--heat),{shade:.2f})">{100 * error:.2f}%</td>'


def size_section(log: TrainingLog) -> str:
    """Bytes of the weights as f32 and quantized, by part of the model."""
    sizes = _sizes(log)
    if not sizes:
        return ""
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, size in sizes.items():
        for index, key in enumerate(_BYTES):
            parts[_part(name)][index] += size[key]
    before, after = (sum(part[index] for part in parts.values()) for index in (0, 1))
    colors = dict(zip(parts, ("var(--accent)", "var(--second)", "var(--third)"), strict=False))
    bars = "".join(
        f"<span>{label}</span>{_bar(parts, index, before, colors)}<span>{megabytes(total)}</span>"
        for index, (label, total) in enumerate((("f32", before), ("quantized", after)))
    )
    legend = "".join(
        f'<span class="key"><i style="background:{color}"></i>{escape(part)}</span>'
        for part, color in colors.items()
    )
    ratio = f"{before / after:.2f} times smaller" if after else ""
    rows = [
        [name, f"{s['numel']:,}", str(s["bits"]), *(f"{s[key]:,}" for key in _BYTES)]
        for name, s in sizes.items()
    ]
    header = ["weight", "elements", "bits", "bytes f32", "bytes quantized"]
    return section(
        "Size",
        f"Weights as f32 and as integer codes with their scales: {ratio}.",
        f'<div class="size">{bars}</div><p class="legend">{legend}</p>'
        + details(f"All {len(rows)} weights", table(header, rows)),
    )


def _part(name: str) -> str:
    if "embeddings" in name:
        return "embeddings"
    return "layers" if LAYER_PARAMETER.fullmatch(name) else "pooler and head"


def _bar(parts: dict[str, list[float]], index: int, full: float, colors: dict[str, str]) -> str:
    cells = "".join(
        f'<i style="width:{100 * part[index] / max(full, 1):.2f}%;background:{colors[name]}" '
        f'title="{escape(name)}: {megabytes(part[index])}"></i>'
        for name, part in parts.items()
    )
    return f'<div class="bar">{cells}</div>'


def config_section(log: TrainingLog) -> str:
    """Every value of the completed config with its origin, and where the time went."""
    body = ""
    timings = _dict_of(log, "timings", (int, float))
    if timings:
        whole = sum(timings.values()) or 1.0
        rows = [[k, f"{s:,.1f}", f"{100 * s / whole:.1f}%"] for k, s in timings.items()]
        body += table(["phase", "seconds", "share"], rows)
    memory = _dict_of(log, "memory_bytes", (int,))
    if memory:
        rows = [[name, megabytes(count)] for name, count in memory.items()]
        body += details("Memory of one process", table(["buffers", "size"], rows))
    config = log.start.get("config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except json.JSONDecodeError:
            config = {"config": config}
    origins = log.start.get("origins")
    origins = origins if isinstance(origins, dict) else {}
    if isinstance(config, dict):
        values = list(flatten(config))
        rows = [[key, json.dumps(value), str(origins.get(key, ""))] for key, value in values]
        listing = table(["key", "value", "from"], rows, text_columns=(1, 2))
        body += details(f"All {len(rows)} values of the configuration", listing)
    return section(
        "Run", "Where the time and the memory went, and the configuration as it was used.", body
    )


def _dict_of(log: TrainingLog, key: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    found = (log.end or {}).get(key)
    if not isinstance(found, dict):
        return {}
    return {str(k): v for k, v in found.items() if isinstance(v, kinds)}


def _sizes(log: TrainingLog) -> dict[str, dict[str, int]]:
    needed = ("numel", "bits", *_BYTES)
    return {
        name: size
        for name, size in _dict_of(log, "quantized_sizes", (dict,)).items()
        if all(isinstance(size.get(key), int) for key in needed)
    }
