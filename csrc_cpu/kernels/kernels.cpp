#include "csrc_cpu/kernels/kernels.h"

#include <array>

namespace bitfall {

// Defined by the copies of the kernel sources.
#define BITFALL_DECLARE_KERNELS(isa)                              \
  namespace isa {                                                 \
  extern const AdamKernels adam_kernels;                          \
  extern const AttentionKernels attention_kernels;                \
  extern const AttentionTangentKernels attention_tangent_kernels; \
  extern const ElementwiseKernels elementwise_kernels;            \
  extern const FakeQuantizeKernels fake_quantize_kernels;         \
  extern const LayerNormKernels layer_norm_kernels;               \
  }
BITFALL_DECLARE_KERNELS(generic)
BITFALL_DECLARE_KERNELS(avx2)
BITFALL_DECLARE_KERNELS(avx512)
BITFALL_DECLARE_KERNELS(avx512_bf16)
#undef BITFALL_DECLARE_KERNELS

namespace {

#define BITFALL_KERNEL_TABLE(isa)                                                        \
  KernelTable {                                                                          \
    &isa::adam_kernels, &isa::attention_kernels, &isa::attention_tangent_kernels,        \
        &isa::elementwise_kernels, &isa::fake_quantize_kernels, &isa::layer_norm_kernels \
  }
const std::array<KernelTable, 4> kTables{BITFALL_KERNEL_TABLE(generic), BITFALL_KERNEL_TABLE(avx2),
                                         BITFALL_KERNEL_TABLE(avx512),
                                         BITFALL_KERNEL_TABLE(avx512_bf16)};
#undef BITFALL_KERNEL_TABLE

}  // namespace

const KernelTable& kernel_table(CpuIsa isa) { return kTables.at(static_cast<std::size_t>(isa)); }

}  // namespace bitfall
