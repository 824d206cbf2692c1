"""The trained model on disk: quantized, as f32 masters, and as integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfall.outputs import add_labels_to_model_config
from bitfall.tokenization import copy_tokenizer_files

if TYPE_CHECKING:
    from pathlib import Path

    from bitfall._core import Communicator, Engine
    from bitfall.problem import Problem

MASTER_FOLDER = "master"


def save_model(
    engine: Engine,
    problem: Problem,
    model_dir: Path,
    output_dir: Path,
    quantized: bool,
    communicator: Communicator,
) -> None:
    """Writes folders that from_pretrained loads, tokenizer included. All ranks call it.

    With `quantized`: output_dir holds weights exactly on their grid and their integers in
    quantized.safetensors, output_dir/master the f32 weights. Otherwise output_dir holds the latter.
    """
    folders = {output_dir: "quantized" if quantized else "master"}
    if quantized:
        folders[output_dir / MASTER_FOLDER] = "master"
    for folder, weights in folders.items():
        if communicator.rank == 0:
            folder.mkdir(exist_ok=True)
        communicator.barrier()
        engine.save_model(str(folder), weights)
        if communicator.rank == 0:
            add_labels_to_model_config(folder, problem.name, problem.labels)
            copy_tokenizer_files(model_dir, folder)
    if quantized:
        engine.save_model(str(output_dir), "integers")
