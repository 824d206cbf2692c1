// What streams have still to do.
#pragma once

#include <cuda_runtime.h>

#include <functional>

namespace emulator {

/// Does `work` after what `stream` has still to do: at once, or when somebody waits for it.
void enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace emulator
