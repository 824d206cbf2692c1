// What the groups of ternary and binary ranges share: means of magnitudes, in the order of sums
// that quantizer/quant_math.h lays down.
#pragma once

#include <cstddef>

#include "csrc_cuda/cuda_utils.h"
#include "csrc_cuda/quantize_table.h"

namespace bitfall {

/// Bytes of scratch memory for find_sign_groups.
std::size_t sign_groups_scratch_bytes(const QuantizeTable& table);

/// A QuantGroup per group of the table, in `scratch`, which must lie at a multiple of 16 bytes;
/// only those of ternary and binary ranges are written. Throws BackendError.
const QuantGroup* find_sign_groups(const QuantizeTable& table, const float* master, void* scratch,
                                   cudaStream_t stream);

}  // namespace bitfall
