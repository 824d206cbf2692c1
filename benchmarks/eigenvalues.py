"""Eigenvalues of all layers, one batch of 8 x 64 tokens: against power iteration in PyTorch."""

import argparse
import tempfile
from statistics import median
from typing import Any

from results import Result
from workers.protocol import median_ratio, python_worker

TARGET_SPEEDUP = 6.0
TARGET_ERROR = 0.01
ROUNDS = 3


def print_layers(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """One line per layer: eigenvalues, iterations of both sides, products of ours."""
    for layer, (value, exact) in enumerate(zip(ours["values"], peer["values"], strict=True)):
        print(
            f"  layer {layer:2d}  bitfall {value:10.6f}  PyTorch {exact:10.6f}  "
            f"difference {value / exact - 1:+.3%}  iterations {ours['iterations'][layer]} beside "
            f"{peer['iterations'][layer]}, products {ours['products'][layer]}"
        )


def run(model: str, rounds: int = ROUNDS) -> list[Result]:
    """Both sides start from the same vectors at the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        bitfall = python_worker("bitfall_eigenvalues", "--model", model, "--save", folder)
        torch = python_worker("torch_eigenvalues", "--model", folder)
        ours, peer = [], []
        for _ in range(rounds):
            ours.append(bitfall.measure())
            peer.append(torch.measure())
        bitfall.close()
        torch.close()
    print_layers(ours[0], peer[0])
    ours_seconds = [measurement["seconds"] for measurement in ours]
    peer_seconds = [measurement["seconds"] for measurement in peer]
    error = max(
        abs(value / exact - 1)
        for value, exact in zip(ours[0]["values"], peer[0]["values"], strict=True)
    )
    products, iterations = sum(ours[0]["products"]), sum(peer[0]["iterations"])
    return [
        Result(
            "eigenvalues, speed beside double backward in PyTorch",
            median_ratio(peer_seconds, ours_seconds),
            TARGET_SPEEDUP,
            f"{median(ours_seconds):.2f} s beside {median(peer_seconds):.2f} s, "
            f"{products} products beside {iterations}",
        ),
        Result("eigenvalues, largest relative difference", error, TARGET_ERROR, "", at_most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of MiniLM-L6")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    for result in run(args.model, args.rounds):
        print(f"{result.name}: {result.value:.4g} (target {result.target:g})  {result.detail}")


if __name__ == "__main__":
    main()
