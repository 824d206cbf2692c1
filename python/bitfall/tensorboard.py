"""TensorBoard scalars (tensorboardX): --report_to tensorboard and the config's own section."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall.errors import ArgumentsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitfall._core import CompletedConfig, StepResult


class TensorBoard:
    """Writes every scalar to one or more log folders; none: does nothing."""

    def __init__(self, directories: list[Path], first_step: int) -> None:
        """`first_step`: events of an interrupted run from this step on are hidden."""
        self._writers: list[Any] = []
        if not directories:
            return
        try:
            from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
        except ImportError:
            raise ArgumentsError(
                "TensorBoard is asked for, but the package tensorboardX is not installed"
            ) from None
        self._writers = [
            SummaryWriter(str(directory), purge_step=first_step) for directory in directories
        ]

    def step(self, step: int, result: StepResult) -> None:
        """Scalars of one training step."""
        self._add(
            step,
            {
                "train/loss": result["loss"],
                "train/learning_rate": result["learning_rate"],
                "train/grad_norm": result["grad_norm"],
                "train/loss_scale": result["loss_scale"],
            },
        )
        self._add(step, {f"bits/{name}": float(bits) for name, bits in result["bits"].items()})
        self._add(
            step,
            {f"eigenvalues/{block['name']}": block["value"] for block in result["eigenvalues"]},
        )

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """eval_accuracy becomes eval/accuracy."""
        self._add(
            step,
            {
                name.replace("_", "/", 1): float(value)
                for name, value in metrics.items()
                if isinstance(value, (int, float))
            },
        )

    def close(self) -> None:
        """Writes what is pending."""
        for writer in self._writers:
            writer.close()

    def _add(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            for name, value in scalars.items():
                if math.isfinite(value):
                    writer.add_scalar(name, value, step)


def log_directories(config: CompletedConfig, output_dir: Path, report_to: bool) -> list[Path]:
    """output_dir/runs for --report_to tensorboard; output_path/job_name of the config's section."""
    directories = [output_dir / "runs"] if report_to else []
    section = json.loads(config.json).get("tensorboard", {})
    if section.get("enabled"):
        root = section.get("output_path") or str(output_dir / "runs")
        directories.append(Path(root) / section.get("job_name", "DeepSpeedJobName"))
    return directories
