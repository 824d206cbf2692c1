#include "csrc_cpu/cpu_isa.h"

#include <cstdlib>
#include <string>

#include "core/error.h"

namespace bitfall {

std::string_view name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::generic:
      return "generic";
    case CpuIsa::avx2:
      return "avx2";
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx512_bf16:
      return "avx512_bf16";
  }
  return "?";
}

std::vector<CpuIsa> supported_isas() {
  std::vector<CpuIsa> isas{CpuIsa::generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return isas;
  }
  isas.push_back(CpuIsa::avx2);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return isas;
  }
  isas.push_back(CpuIsa::avx512);
  if (__builtin_cpu_supports("avx512bf16")) isas.push_back(CpuIsa::avx512_bf16);
#endif
  return isas;
}

CpuIsa choose_isa() {
  const std::vector<CpuIsa> isas = supported_isas();
  const char* wanted = std::getenv("BITFALL_CPU_ISA");
  if (wanted == nullptr) return isas.back();
  std::string possible;
  for (const CpuIsa isa : isas) {
    if (name(isa) == wanted) return isa;
    possible += (possible.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw UnsupportedError(concat("BITFALL_CPU_ISA = '", wanted, "': this CPU can run ", possible));
}

}  // namespace bitfall
