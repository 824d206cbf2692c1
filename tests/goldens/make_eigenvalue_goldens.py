"""Writes eigenvalues.safetensors: exact eigenvalues of the models of the other golden files.

    python make_eigenvalue_goldens.py MODEL_DIR       MODEL_DIR: the folder of MiniLM-L6

Needs torch, transformers and safetensors. tiny.* is tiny_classification_gelu in f64: the largest
|eigenvalue| of each block's dense Hessian, and power iteration by exact double differentiation with
its iterations; minilm.* is the same power iteration on MiniLM-L6 with the head and batch of
minilm.safetensors.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "benchmarks" / "workers"))
from power_iteration import (  # noqa: E402
    PowerIteration,
    layer_eigenvalue,
    layer_parameters,
)

SEED, STEP = 42, 1  # of the start vectors
ROWS_AT_ONCE = 256
Arrays = dict[str, np.ndarray]


def packed_loss(model: BertForSequenceClassification, golden: Arrays) -> torch.Tensor:
    """Mean loss over the sequences of a golden batch, each run alone: no padding."""
    starts = golden["sequence_starts"]
    losses = []
    for index, label in enumerate(golden["labels"]):
        tokens = slice(starts[index], starts[index + 1])
        ids, types = (
            torch.from_numpy(golden[key][tokens]).long()[None]
            for key in ("input_ids", "token_type_ids")
        )
        labels = torch.tensor([int(label)])
        losses.append(model(input_ids=ids, token_type_ids=types, labels=labels).loss)
    return torch.stack(losses).mean()


def as_arrays(prefix: str, results: list[PowerIteration]) -> Arrays:
    return {
        f"{prefix}.power_iteration": np.array([r.value for r in results], dtype=np.float32),
        f"{prefix}.iterations": np.array([r.iterations for r in results], dtype=np.int32),
    }


def dense_eigenvalue(model: BertForSequenceClassification, golden: Arrays, layer: int) -> float:
    """Largest |eigenvalue| of the dense Hessian of one layer."""
    parameters = layer_parameters(model, layer)
    sizes = [parameter.numel() for parameter in parameters]
    gradients = torch.autograd.grad(packed_loss(model, golden), parameters, create_graph=True)
    rows = []
    for units in torch.eye(sum(sizes), dtype=torch.float64).split(ROWS_AT_ONCE):
        parts = [
            part.reshape(len(units), *gradient.shape)
            for part, gradient in zip(units.split(sizes, dim=1), gradients, strict=True)
        ]
        columns = torch.autograd.grad(
            gradients, parameters, grad_outputs=parts, retain_graph=True, is_grads_batched=True
        )
        rows.append(torch.cat([column.flatten(1) for column in columns], dim=1))
    return torch.linalg.eigvalsh(torch.cat(rows)).abs().max().item()


def make_tiny() -> Arrays:
    golden = load_file(HERE / "tiny_classification_gelu.safetensors")
    config = BertConfig.from_json_file(HERE / "tiny_classification_gelu.json")
    config._attn_implementation = "eager"
    model = BertForSequenceClassification(config).double().eval()
    weights = {
        key.removeprefix("weight."): torch.from_numpy(value).double()
        for key, value in golden.items()
        if key.startswith("weight.")
    }
    model.load_state_dict(weights, strict=False)
    layers = range(config.num_hidden_layers)
    results = [
        layer_eigenvalue(model, lambda: packed_loss(model, golden), layer, SEED, STEP)
        for layer in layers
    ]
    dense = [dense_eigenvalue(model, golden, layer) for layer in layers]
    return as_arrays("tiny", results) | {"tiny.dense": np.array(dense, dtype=np.float32)}


def make_minilm(model_dir: str) -> Arrays:
    golden = load_file(HERE / "minilm.safetensors")
    model = BertForSequenceClassification.from_pretrained(
        model_dir, num_labels=3, attn_implementation="eager", dtype=torch.float32
    ).eval()
    for kind in ("weight", "bias"):
        values = torch.from_numpy(golden[f"weight.classifier.{kind}"])
        model.get_parameter(f"classifier.{kind}").data.copy_(values)
    results = [
        layer_eigenvalue(model, lambda: packed_loss(model, golden), layer, SEED, STEP)
        for layer in range(model.config.num_hidden_layers)
    ]
    return as_arrays("minilm", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", help="folder of MiniLM-L6")
    arguments = parser.parse_args()
    arrays = make_minilm(arguments.model_dir) | make_tiny()
    for key, values in arrays.items():
        print(key, values.tolist())
    save_file(arrays, HERE / "eigenvalues.safetensors")
    (HERE / "eigenvalues.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
