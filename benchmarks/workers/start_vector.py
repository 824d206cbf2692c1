"""The start vectors of bitfall's power iteration, in numpy: eigen_sched/eigenvalue_estimator.h."""

import numpy as np
import numpy.typing as npt

STREAM = 0xE16E0000
MASK = np.uint64(0xFFFFFFFF)


def philox(
    counter: list[npt.NDArray[np.uint64]], key: tuple[int, int]
) -> list[npt.NDArray[np.uint64]]:
    """Philox4x32-10 (Salmon et al., SC 2011) on four arrays of 32-bit counter words."""
    low, high = key
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * counter[0]
        product1 = np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (product1 >> np.uint64(32)) ^ counter[1] ^ np.uint64(low),
            product1 & MASK,
            (product0 >> np.uint64(32)) ^ counter[3] ^ np.uint64(high),
            product0 & MASK,
        ]
        low = (low + 0x9E3779B9) & 0xFFFFFFFF
        high = (high + 0xBB67AE85) & 0xFFFFFFFF
    return counter


def start_vector(seed: int, step: int, block: int, numel: int) -> npt.NDArray[np.float32]:
    """Element 2i is the sum of the four 16-bit halves of words 0 and 1 of counter i, 2i + 1 that of
    words 2 and 3, shifted to mean 0 and scaled to variance 1."""
    index = np.arange((numel + 1) // 2, dtype=np.uint64)
    constants = [np.full_like(index, value) for value in (STREAM, block, step)]
    words = philox([index, *constants], (seed & 0xFFFFFFFF, seed >> 32))
    halves = [(word & np.uint64(0xFFFF)) + (word >> np.uint64(16)) for word in words]
    sums = np.stack([halves[0] + halves[1], halves[2] + halves[3]], axis=1).reshape(-1)[:numel]
    return (sums.astype(np.float32) - np.float32(131070)) * np.float32(1 / np.float32(37837.227))
