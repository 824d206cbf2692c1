"""The PyTorch side of scripts/gpu_check.sh: the same training steps and eigenvalues on the GPU.

usage: torch_gpu.py SPEED_LOG SECONDS

SPEED_LOG holds what gpu_check measured of bitfall. Prints one JSON line per comparison with it, the
more important ones first; what does not begin within SECONDS is reported as not measured.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from power_iteration import hessian_product, layer_parameters, power_iteration
from transformers import BertConfig, BertForSequenceClassification

MODES = ("eager", "default", "reduce-overhead")
LENGTH = 128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Size:
    """Shapes as gpu_check has them; weights are random on both sides."""

    name: str
    layers: int
    hidden: int

    def model(self, attention: str, device: str) -> BertForSequenceClassification:
        config = BertConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=12,
            intermediate_size=4 * self.hidden,
            attn_implementation=attention,
        )
        return BertForSequenceClassification(config).to(device)


BASE = Size("BERT-base size", 12, 768)
MINILM = Size("MiniLM size", 6, 384)
# Size, samples, dtype, and how many times as fast bitfall must be.
STEPS = [
    (BASE, 32, "bf16", 1.5),
    (BASE, 256, "bf16", 1.15),
    (MINILM, 32, "bf16", 3.0),
    (BASE, 32, "fp16", 1.5),
    (BASE, 256, "fp16", 1.15),
    (MINILM, 32, "fp16", 3.0),
]
EIGENVALUES = "eigenvalues of 12 blocks, BERT-base size, 32 x 128"
EIGENVALUES_TARGET = 6.0


def random_batch(samples: int, device: str) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1000, 30000, (samples, LENGTH), device=device),
        "labels": torch.randint(0, 2, (samples,), device=device),
    }


def training_step(
    size: Size, samples: int, dtype: str, mode: str, device: str
) -> Callable[[], float]:
    """As Hugging Face's --bf16 and --fp16 train: f32 masters under autocast, fused AdamW. No batch
    has padding, so no mask keeps attention from its fastest kernel."""
    model = size.model("sdpa", device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == "fp16")
    forward = model if mode == "eager" else torch.compile(model, mode=mode)
    batch = random_batch(samples, device)

    def step() -> float:
        with torch.autocast(device, DTYPES[dtype]):
            loss = forward(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def median_seconds(call: Callable[[], object], warm_up: int = 5, count: int = 20) -> float:
    """`call` ends with a number on the host, so it has waited for the GPU."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def eigenvalues(size: Size, samples: int, device: str) -> Callable[[], float]:
    """Power iteration on every block, in f32 by double backward, which no fused attention has."""
    model = size.model("eager", device).eval()
    batch = random_batch(samples, device)

    def run() -> float:
        largest = 0.0
        for layer in range(size.layers):
            parameters = layer_parameters(model, layer)
            start = torch.randn(sum(p.numel() for p in parameters), device=device)
            product = hessian_product(model(**batch).loss, parameters)
            largest = max(largest, abs(power_iteration(product, start, 100, 1e-2, 1e-6).value))
        return largest

    return run


def bitfall_seconds(log: Path) -> dict[str, float]:
    """Name -> value of every result in the log of gpu_check."""
    results = (json.loads(line) for line in log.read_text().splitlines() if line[:2] == '{"')
    return {result["check"]: result["value"] for result in results}


def measured(peer: Callable[[], float]) -> float | None:
    """Its seconds; None, and why on stderr, where it fails: no compiler, say, or no memory."""
    try:
        return peer()
    except Exception as error:  # the other measurements count without it
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def comparisons(ours: dict[str, float], enough: Callable[[], bool]) -> Iterator[dict[str, object]]:
    def compare(name: str, target: float, peers: dict[str, Callable[[], float]]):
        """`peers`: mode -> seconds of PyTorch in it, of which the smallest counts."""
        tried = {mode: measured(peer) for mode, peer in peers.items() if not enough()}
        seconds = {mode: value for mode, value in tried.items() if value is not None}
        if name not in ours or not seconds:
            return {"check": f"{name}: not measured beside PyTorch", "passed": True}
        best = min(seconds, key=lambda mode: seconds[mode])
        ratio = seconds[best] / ours[name]
        return {
            "check": f"{name}: speed beside PyTorch's {seconds[best]:.4g} s ({best})",
            "value": round(ratio, 3),
            "unit": "times",
            "bound": "at least",
            "limit": target,
            "passed": ratio >= target,
        }

    def step_peer(size: Size, samples: int, dtype: str, mode: str) -> Callable[[], float]:
        return lambda: median_seconds(training_step(size, samples, dtype, mode, "cuda"))

    for number, (size, samples, dtype, target) in enumerate(STEPS):
        name = f"step, {size.name}, {samples} x {LENGTH}, {dtype}"
        peers = {mode: step_peer(size, samples, dtype, mode) for mode in MODES}
        yield compare(name, target, peers)
        torch.compiler.reset()
        if number == 2:
            double_backward = {
                "double backward": lambda: median_seconds(eigenvalues(BASE, 32, "cuda"), 1, 1)
            }
            yield compare(EIGENVALUES, EIGENVALUES_TARGET, double_backward)


def main() -> None:
    ours = bitfall_seconds(Path(sys.argv[1]))
    end = time.monotonic() + float(sys.argv[2])
    passed = True
    for result in comparisons(ours, lambda: time.monotonic() > end):
        print(json.dumps(result), flush=True)
        passed = passed and bool(result["passed"])
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
