// Which instruction set the hand-written kernels use: chosen once at run time.
#pragma once

#include <string_view>
#include <vector>

namespace bitfall {

/// In rising order; each level includes the ones before it.
enum class CpuIsa { generic, avx2, avx512, avx512_bf16 };

std::string_view name(CpuIsa isa);

/// Levels that this CPU can run, lowest first.
std::vector<CpuIsa> supported_isas();

/// The best supported level, or the one named by the environment variable BITFALL_CPU_ISA.
///
/// Throws UnsupportedError that lists the possible values if the variable names anything else.
CpuIsa choose_isa();

}  // namespace bitfall
