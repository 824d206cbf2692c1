"""Peak memory of the training step: growth beyond the libraries, and the whole process."""

from results import Result
from training_step import torch_variants
from workers.protocol import python_worker


def peak(name: str, model: str, arguments: list[str]) -> tuple[int, int]:
    """(bytes above the process before the model was loaded, bytes of the whole process)."""
    worker = python_worker(name, "--model", model, *arguments)
    measured = worker.measure()
    worker.close()
    return measured["peak_bytes"] - measured["base_bytes"], measured["peak_bytes"]


def run(model: str) -> list[Result]:
    results = []
    for dtype in ("f32", "bf16"):
        ours = peak("bitfall_step", model, ["--dtype", dtype])
        peers = [peak("torch_step", model, variant) for variant in torch_variants(dtype)]
        best = min(peers)
        detail = f"{ours[0] / 2**20:.0f} MiB beside {best[0] / 2**20:.0f} MiB"
        whole = f"{ours[1] / 2**20:.0f} MiB beside {best[1] / 2**20:.0f} MiB"
        results.append(
            Result(
                f"peak memory {dtype} (whole process: {whole})",
                ours[0] / best[0],
                0.6,
                detail,
                True,
            )
        )
    return results
