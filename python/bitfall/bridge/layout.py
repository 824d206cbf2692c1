"""Which parameters of a module the engine trains, and where they lie in its flat buffers."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bitfall._core import ConfigError
from bitfall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from bitfall.bridge.native_selection import ParameterPlacement

NO_BLOCK = -1
FIRST_INDEX = re.compile(r"^(?:(.*?)\.)?(\d+)\.")


class Trained(NamedTuple):
    """One parameter of the module that the engine owns."""

    name: str
    parameter: torch.nn.Parameter
    block: int
    adjacent: bool
    is_embedding: bool = False


def arrange(
    module: torch.nn.Module,
    wanted: Collection[torch.nn.Parameter],
    layer_name: str | None,
    native_layout: Sequence[ParameterPlacement],
) -> list[Trained]:
    """The parameters of `wanted` that require a gradient, in the order of the flat buffers.

    First those of `native_layout` (if not empty, it says order and blocks), then what lies in no
    block, then the blocks, each contiguous. Blocks are numbered from 0 without holes. A tied
    parameter comes once, under its first name.

    Raises InputError if `wanted` holds a parameter that the module does not.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    embeddings = {m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in wanted:
        if parameter not in names:
            raise InputError(
                f"model_parameters: a parameter of shape {list(parameter.shape)} is not in the"
                " model; pass model.parameters() of the same model"
            )
    chosen = {
        name: parameter
        for parameter, name in names.items()
        if parameter in set(wanted) and parameter.requires_grad and parameter.numel() > 0
    }
    if native_layout and all(place.name in chosen for place in native_layout):
        first = [Trained(p.name, chosen[p.name], p.block, p.adjacent) for p in native_layout]
        named = {place.name for place in native_layout}
        rest = [Trained(n, p, NO_BLOCK, False) for n, p in chosen.items() if n not in named]
        return first + rest
    blocks = block_numbers(list(chosen), layer_name)
    trained = [Trained(name, p, blocks[name], False, p in embeddings) for name, p in chosen.items()]
    return sorted(trained, key=lambda entry: entry.block)


def block_numbers(names: Sequence[str], layer_name: str | None) -> dict[str, int]:
    """Name -> number of its block, or NO_BLOCK.

    A block is one entry of the module list `layer_name`; without it, of the list that most
    parameters belong to.
    """
    indices = {name: _index_in_list(name, layer_name) for name in names}
    paths = [found[0] for found in indices.values() if found is not None]
    path = max(set(paths), key=lambda p: (paths.count(p), p), default=None)
    inside = {name: f[1] for name, f in indices.items() if f is not None and f[0] == path}
    numbers = {index: number for number, index in enumerate(sorted(set(inside.values())))}
    return {name: numbers[inside[name]] if name in inside else NO_BLOCK for name in names}


def _index_in_list(name: str, layer_name: str | None) -> tuple[str, int] | None:
    """(path of the module list, index in it) of a parameter; None if it is in none."""
    if layer_name is None:
        match = FIRST_INDEX.match(name)
        return (match[1] or "", int(match[2])) if match else None
    match = re.match(rf"{re.escape(layer_name)}\.(\d+)\.", name)
    return (layer_name, int(match[1])) if match else None


def check_layers(names: Sequence[str], section: dict[str, Any]) -> str:
    """layer_name of the config section "eigenvalue", if the parameters `names` have such a list of
    layer_num entries (0: of any number). Raises ConfigError otherwise."""
    path, count = section["layer_name"], section["layer_num"]
    indices = {f[1] for f in (_index_in_list(name, path) for name in names) if f is not None}
    if not indices:
        numbers = block_numbers(names, None)
        example = next((name for name in names if numbers[name] != NO_BLOCK), None)
        found = _index_in_list(example, None) if example is not None else None
        advice = "the model has no layers"
        if found:
            advice = f"the model's layers are '{found[0]}'; write that"
        raise ConfigError(f'eigenvalue.layer_name = "{path}": {advice}')
    if count not in (0, len(indices)):
        raise ConfigError(
            f"eigenvalue.layer_num = {count}: the model has {len(indices)} layers; write"
            f" {len(indices)} or leave the key out"
        )
    return path


def eigenvalue_section(config: dict[str, Any]) -> dict[str, Any]:
    """Of a completed config: at top level, or in quantize_training."""
    nested = config.get("quantize_training", {}).get("eigenvalue", {})
    section = config.get("eigenvalue", nested)
    return {"layer_name": section["layer_name"], "layer_num": section.get("layer_num", 0)}


def block_names(trained: Sequence[Trained]) -> list[str]:
    """Names of the blocks, "bert.encoder.layer.3", in their order."""
    names: dict[int, list[str]] = {}
    for entry in trained:
        names.setdefault(entry.block, []).append(entry.name)
    return [_common_index(names[block]) for block in sorted(names) if block != NO_BLOCK]


def _common_index(names: Sequence[str]) -> str:
    """What the names begin with, up to the last index that they share."""
    parts = [name.split(".") for name in names]
    common = list(itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False)))
    last = max(index for index, same in enumerate(common) if same[0].isdigit())
    return ".".join(same[0] for same in common[: last + 1])


def specs(trained: Sequence[Trained]) -> list[tuple[str, list[int], int, bool]]:
    """As `_core.Updater` takes them."""
    return [(t.name, list(t.parameter.shape), t.block, t.adjacent) for t in trained]


def check_devices(module: torch.nn.Module) -> None:
    """Raises InputError for parameters that are neither in host memory nor on a GPU of CUDA."""
    for name, parameter in module.named_parameters():
        if parameter.device.type not in ("cpu", "cuda"):
            raise InputError(
                f"initialize: '{name}' is on {parameter.device}, expected cpu or cuda: load the"
                " model there (low_cpu_mem_usage and torch.device('meta') give it no weights)"
            )


def check_dtypes(module: torch.nn.Module, compute_dtype: str) -> None:
    """Raises InputError for parameters that are not f32 although the config says f32."""
    if compute_dtype != "f32":
        return
    other = [
        f"{name} ({str(parameter.dtype).removeprefix('torch.')})"
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != torch.float32
    ]
    if other:
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        raise InputError(
            f"the config trains in f32, but the model has other parameters: {shown}; switch on"
            " bf16 or fp16 in the config, or load the model in float32"
        )


def convert(
    module: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    trained: Sequence[Trained],
) -> None:
    """Moves buffers and the parameters that the engine does not train, and casts floating ones."""

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    ours = {entry.parameter for entry in trained}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter not in ours:
                parameter.data = converted(parameter.data)
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                if (moved := converted(buffer)) is not buffer:
                    setattr(child, name, moved)


def torch_dtype(compute_dtype: str) -> torch.dtype:
    """Of "f32", "bf16", "f16"."""
    dtypes: dict[str, Any] = {
        "f32": torch.float32,
        "bf16": torch.bfloat16,
        "f16": torch.float16,
    }
    return dtypes[compute_dtype]
