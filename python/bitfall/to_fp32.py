"""`bitfall to-fp32 DIR OUT`: the f32 weights of a checkpoint, DeepSpeed's or bitfall's own."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitfall.errors import ArgumentsError
from bitfall.outputs import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterable

EPILOG = """What zero_to_fp32.py does, for stages 0 to 2, without DeepSpeed and PyTorch.

examples:
  bitfall to-fp32 out/checkpoint-500 out/model         writes out/model/model.safetensors
  bitfall to-fp32 out weights.safetensors --tag global_step500"""

MODEL_FILE = "model.safetensors"
CHUNK_BYTES = 1 << 20


class Written(NamedTuple):
    """What the summary says."""

    source: str  # "DeepSpeed 0.14.4"
    step: int
    sizes: list[int]  # elements of every tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the output and the tag."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", help="folder that holds the file 'latest' or the tag")
    parser.add_argument("output", help="a .safetensors file, or a folder for model.safetensors")
    parser.add_argument("--tag", help="checkpoint to read (default: the one 'latest' names)")


def main(args: argparse.Namespace) -> int:
    """Converts one checkpoint. Raises CheckpointError for one that cannot be read."""
    from bitfall.deepspeed_checkpoint import checkpoint_folder, is_deepspeed_checkpoint

    folder = checkpoint_folder(Path(args.checkpoint), args.tag)
    target = _target(Path(args.output))
    convert = _from_deepspeed if is_deepspeed_checkpoint(folder) else _from_bitfall
    written = convert(folder, target)
    print("\n".join(_summary(folder, target, written)))
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


def _from_deepspeed(folder: Path, target: Path) -> Written:
    from bitfall.deepspeed_checkpoint import read_deepspeed_checkpoint
    from bitfall.safetensors_writer import write_safetensors

    checkpoint = read_deepspeed_checkpoint(folder.parent, folder.name, optimizer_states=False)
    write_safetensors(target, checkpoint.weights, {"format": "pt"})
    sizes = [array.size for array in checkpoint.weights.values()]
    return Written(f"DeepSpeed {checkpoint.version}", checkpoint.global_steps, sizes)


def _from_bitfall(folder: Path, target: Path) -> Written:
    """bitfall's own checkpoints hold the masters as they are asked for: a verified copy."""
    state = _read_json(folder / "state.json")
    entry = _read_json(folder / "checksums.json").get(MODEL_FILE, {})
    with (folder / MODEL_FILE).open("rb") as source, atomic_file(target) as output:
        size = checksum = 0
        while chunk := source.read(CHUNK_BYTES):
            output.write(chunk)
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
        if (size, f"{checksum:x}") != (entry.get("bytes"), entry.get("crc32")):
            raise _damaged(folder / MODEL_FILE)
    return Written("bitfall", state.get("global_step", 0), list(_sizes(target)))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        from bitfall._core import CheckpointError

        raise CheckpointError(
            f"{path.parent}: neither a checkpoint of DeepSpeed (mp_rank_00_model_states.pt) nor of"
            f" bitfall ({path.name})"
        )
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _damaged(path)
    return document


def _damaged(path: Path) -> Exception:
    from bitfall._core import CheckpointError

    return CheckpointError(f"{path}: changed or cut short since it was written; use an earlier one")


def _sizes(path: Path) -> Iterable[int]:
    """Elements of every tensor of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            yield (end - begin) // 4  # all are f32


def _summary(folder: Path, target: Path, written: Written) -> Iterable[str]:
    elements = sum(written.sizes)
    yield f"checkpoint   {folder} ({written.source})"
    yield f"step         {written.step}"
    yield f"weights      {len(written.sizes)} tensors, {elements:,} elements, f32"
    yield f"written      {target} ({target.stat().st_size / 1e6:,.1f} MB)"
