"""bitfall_log.jsonl: everything that happened in a training, one JSON object per line.

Append-only; `bitfall report` reads it. Numbers that are not finite are null. Each object has
"event" and, except "start", "step": the number of global batches so far (Hugging Face's
global_step). A skipped step (fp16 overflow) counts as a step, but not in "optimizer_step", the
clock of the bits.

    start        time, version, command (argv), model {path, num_layers, ...config.json}, task,
                 labels, world_size, train_samples, steps_per_epoch, total_steps, layer_name, config
                 (completed DeepSpeed config), origins {key path: origin}, warnings, plan
                 [{name, group, block, factor, drops [[bits, first optimizer step]]}]
    step         optimizer_step, epoch (fraction), loss, learning_rate, grad_norm, loss_scale,
                 skipped, bits {state: bits}, tokens, tokens_per_second
    drop         optimizer_step, name, old_bits, new_bits, next_threshold, factor
    eigenvalues  optimizer_step, blocks [{name, block, iterations, converged, value, normalized,
                 factor}]
    evaluate     epoch, name (of the evaluation set), metrics {eval_...}
    end          finished (false: interrupted), metrics {train_...}, quantization_error {parameter:
                 relative L2}, quantized_sizes {parameter: {numel, bits, bytes_f32,
                 bytes_quantized}}, memory_bytes {...}, timings {phase: seconds}

A resumed run cuts the file back to the length that its checkpoint recorded, so that no step
appears twice.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bitfall.errors import DataError
from bitfall.outputs import finite_or_none, named_errors

LOG_NAME = "bitfall_log.jsonl"


class TrainingLog:
    """Appends events; `offset` (bytes) is what a checkpoint records."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Opens `path` and keeps its first `keep_bytes` bytes (0: starts anew).

        Raises DataError if the file is shorter than that.
        """
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise DataError(
                f"{path}: {size} bytes, but the checkpoint knows {keep_bytes}; the log was cut or"
                " replaced: restore it, or train into another --output_dir"
            )
        self._path = path
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)
        self.offset = keep_bytes

    def write(self, event: str, **fields: Any) -> None:
        """One line, handed to the operating system at once."""
        line = json.dumps(finite_or_none({"event": event, **fields}), allow_nan=False) + "\n"
        data = line.encode()
        with named_errors(self._path):
            self._file.write(data)
            self._file.flush()
        self.offset += len(data)

    def sync(self) -> None:
        """Brings all lines to the disk; before a checkpoint records the offset."""
        with named_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Brings all lines to the disk and closes the file."""
        self.sync()
        with named_errors(self._path):
            self._file.close()
