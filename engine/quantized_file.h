// quantized.safetensors: the quantized model as true integers, a quarter or less of its f32 size.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/parameter_store.h"
#include "quantizer/quantizer.h"

namespace bitfall {

/// Writes folder/quantized.safetensors; creates the folder.
///
/// A quantized parameter P becomes P.codes, P.scales F32 [groups] and, where asymmetric,
/// P.zero_points I32 [groups]; value[i] = (code[i] + zero_point) * scale of the i-th element's
/// group (equal slices of the flattened tensor), bit for bit what evaluation uses. Codes are I8 or
/// U8 (asymmetric) in the shape of P at 8 bits, I16 or U16 above, and below that U8 [bytes], a
/// stream of bits as PackedCodes describes. Every other parameter is F32 under its own name. The
/// metadata of P.codes' file entry P says "bits=.. code_bits=.. groups=.. shape=[..]".
///
/// `masters` [per parameter] f32 are parallel to `parameters`; `step` is the optimizer step whose
/// weights are written. Throws ModelFileError (no permission,
/// full disk); an older file then stays.
void save_quantized_file(const std::filesystem::path& folder, Backend& backend,
                         const std::vector<Parameter>& parameters, std::span<const Tensor> masters,
                         const Quantizer& quantizer, std::int64_t step);

}  // namespace bitfall
