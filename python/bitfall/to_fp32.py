"""`bitfall to-fp32 DIR OUT`: the f32 weights of a checkpoint, DeepSpeed's or bitfall's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitfall.errors import ArgumentsError

EPILOG = """What zero_to_fp32.py does, for stages 0 to 2, without DeepSpeed and PyTorch.

examples:
  bitfall to-fp32 out/checkpoint-500 out/model         writes out/model/model.safetensors
  bitfall to-fp32 out weights.safetensors --tag global_step500"""

MODEL_FILE = "model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the output and the tag."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", help="folder that holds the file 'latest' or the tag")
    parser.add_argument("output", help="a .safetensors file, or a folder for model.safetensors")
    parser.add_argument("--tag", help="checkpoint to read (default: the one 'latest' names)")


def main(args: argparse.Namespace) -> int:
    """Converts one checkpoint. Raises CheckpointError for one that cannot be read."""
    from bitfall.checkpoint_weights import read_checkpoint_weights
    from bitfall.safetensors_file import write_safetensors

    checkpoint = read_checkpoint_weights(Path(args.checkpoint), args.tag)
    target = _target(Path(args.output))
    write_safetensors(target, checkpoint.arrays, {"format": "pt"})
    elements = sum(array.size for array in checkpoint.arrays.values())
    print(f"checkpoint   {checkpoint.folder} ({checkpoint.source})")
    print(f"step         {checkpoint.step}")
    print(f"weights      {len(checkpoint.arrays)} tensors, {elements:,} elements, f32")
    print(f"written      {target} ({target.stat().st_size / 1e6:,.1f} MB)")
    return 0


def _target(output: Path) -> Path:
    if output.suffix == ".safetensors" and not output.is_dir():
        if not output.parent.is_dir():
            raise ArgumentsError(f"{output.parent}: no such folder; make it first")
        return output
    if output.exists() and not output.is_dir():
        raise ArgumentsError(f"{output}: not a folder; give a folder or a name.safetensors")
    output.mkdir(parents=True, exist_ok=True)
    return output / MODEL_FILE
