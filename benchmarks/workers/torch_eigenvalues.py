"""Worker: the same eigenvalues by power iteration with double backward in PyTorch."""

import argparse
import time

import numpy as np
import torch
from power_iteration import layer_eigenvalue
from protocol import serve
from transformers import BertForSequenceClassification

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder with the head that bitfall saved")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--step", type=int, default=1)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()

torch.set_num_threads(args.threads)
model = BertForSequenceClassification.from_pretrained(
    args.model, attn_implementation="eager", dtype=torch.float32
).eval()
generator = np.random.default_rng(0)
input_ids = torch.from_numpy(generator.integers(1000, 30000, args.batch * args.length))
input_ids = input_ids.reshape(args.batch, args.length)
labels = torch.arange(args.batch) % 2


def loss() -> torch.Tensor:
    return model(input_ids=input_ids, labels=labels).loss


def measure() -> dict[str, object]:
    begin = time.perf_counter()
    layers = [
        layer_eigenvalue(model, loss, layer, args.seed, args.step)
        for layer in range(model.config.num_hidden_layers)
    ]
    return {
        "seconds": time.perf_counter() - begin,
        "values": [abs(layer.value) for layer in layers],
        "iterations": [layer.iterations for layer in layers],
    }


loss().backward()
serve(measure)
