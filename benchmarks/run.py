"""Runs the benchmarks and prints every ratio beside what it must reach. See README.md here."""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import eigenvalues
import memory
import moq_overhead
import mrpc
import ranks
import trainer
import training_step
from results import Result


def print_table(results: list[Result]) -> None:
    for result in results:
        bound = "<=" if result.at_most else ">="
        verdict = "reached" if result.reached else "MISSED"
        print(
            f"{result.name:60s} {result.value:6.2f}  {bound} {result.target:<5g} {verdict:8s} "
            f"{result.detail}"
        )


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of MiniLM-L6: config.json, model.safetensors"
    )
    parser.add_argument(
        "--glue_dir", type=Path, help="folder that holds MRPC/train.tsv and dev.tsv"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="names from the table in README.md"
    )
    parser.add_argument(
        "--products", type=Path, default=root / "build/release/benchmarks/step_products"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of the MRPC run")
    parser.add_argument("--max_train_samples", type=int, help="of the MRPC run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    args = parser.parse_args()

    benchmarks: dict[str, Callable[[], list[Result]]] = {
        "training_step": lambda: training_step.run(args.model, args.products),
        "moq_overhead": lambda: moq_overhead.run(args.model),
        "eigenvalues": lambda: eigenvalues.run(args.model),
        "ranks": lambda: ranks.run(args.model),
        "memory": lambda: memory.run(args.model),
        "mrpc": lambda: mrpc.run(args.model, args.glue_dir, args.epochs, args.max_train_samples),
        "trainer": lambda: trainer.run(args.model, args.glue_dir),
    }
    if args.glue_dir is None:
        del benchmarks["mrpc"], benchmarks["trainer"]
    chosen = args.only or list(benchmarks)
    unknown = sorted(set(chosen) - set(benchmarks))
    if unknown:
        parser.error(
            f"unknown or unavailable benchmarks {unknown}: choose from {sorted(benchmarks)}"
        )
    results: list[Result] = []
    for name in chosen:
        measured = benchmarks[name]()
        print_table(measured)
        results += measured
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    machine = {"cpu": cpu.split(":")[-1].strip(), "platform": platform.platform()}
    args.output.write_text(
        json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=2)
    )


if __name__ == "__main__":
    main()
