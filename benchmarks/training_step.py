"""A training step: against PyTorch's best mode, and against its own matrix products alone."""

from pathlib import Path
from statistics import median

from results import Result
from workers.protocol import Worker, median_ratio, paired_seconds, python_worker

TARGET_SPEEDUP = {"f32": 1.5, "bf16": 2.0}
TARGET_SHARE = {"f32": 0.70, "bf16": 0.55}
ROUNDS = 5


def torch_variants(dtype: str) -> list[list[str]]:
    """bf16 as Hugging Face's --bf16 trains: f32 masters under autocast."""
    return [["--dtype", dtype, "--mode", mode] for mode in ("eager", "compiled")]


def best_torch(model: str, dtype: str) -> tuple[Worker, str]:
    """The fastest of PyTorch's modes by the median of three steps; the others are closed."""
    best: tuple[float, Worker, str] | None = None
    for variant in torch_variants(dtype):
        worker = python_worker("torch_step", "--model", model, *variant)
        seconds = median(paired_seconds([worker], 3)[0])
        if best is None or seconds < best[0]:
            if best is not None:
                best[1].close()
            best = (seconds, worker, " ".join(variant[1::2]))
        else:
            worker.close()
    assert best is not None
    return best[1], best[2]


def run(model: str, products_program: Path) -> list[Result]:
    results = []
    for dtype in ("f32", "bf16"):
        peer, mode = best_torch(model, dtype)
        ours = python_worker("bitfall_step", "--model", model, "--dtype", dtype)
        products = Worker([str(products_program), dtype])
        ours_seconds, peer_seconds, product_seconds = paired_seconds([ours, peer, products], ROUNDS)
        results.append(
            Result(
                f"training step {dtype}, speed beside PyTorch ({mode})",
                median_ratio(peer_seconds, ours_seconds),
                TARGET_SPEEDUP[dtype],
                f"{median(ours_seconds):.3f} s beside {median(peer_seconds):.3f} s",
            )
        )
        results.append(
            Result(
                f"training step {dtype}, share of its matrix products",
                median_ratio(product_seconds, ours_seconds),
                TARGET_SHARE[dtype],
                f"products alone {median(product_seconds):.3f} s",
            )
        )
        for worker in (ours, peer, products):
            worker.close()
    return results
