"""A training step with MoQ on (8 bits, 8 groups) against off."""

from statistics import median

from results import Result
from workers.protocol import median_ratio, paired_seconds, python_worker

ROUNDS = 9


def run(model: str) -> list[Result]:
    results = []
    for dtype in ("f32", "bf16"):
        quantized = python_worker("bitfall_step", "--model", model, "--dtype", dtype, "--bits", "8")
        plain = python_worker("bitfall_step", "--model", model, "--dtype", dtype)
        on, off = paired_seconds([quantized, plain], ROUNDS)
        detail = f"{median(on):.3f} s beside {median(off):.3f} s"
        results.append(
            Result(f"MoQ on against off, {dtype}", median_ratio(on, off), 1.03, detail, True)
        )
        quantized.close()
        plain.close()
    return results
