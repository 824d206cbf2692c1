// The hand-written loops of the CPU backend: one table of function pointers per instruction set.
//
// How a family is built: `kernels/x.h` declares a struct of function pointers; `kernels/x.cpp` is
// compiled once per instruction set (cmake/BitfallKernels.cmake), keeps everything in an anonymous
// namespace inside `namespace bitfall::BITFALL_ISA` and defines one `const XKernels x_kernels`.
// Kernels run on one thread and on plain pointers: the operation files above them check shapes,
// pick the dtype and split the work over threads.
//
// Rules in kernel sources: no standard-library function templates (std::max, std::fabs, ... would
// be emitted as weak symbols that another instruction set's copy may replace): builtins and
// BITFALL_INLINE helpers only.
#pragma once

#include "csrc_cpu/cpu_isa.h"
#include "csrc_cpu/kernels/adam.h"
#include "csrc_cpu/kernels/attention.h"
#include "csrc_cpu/kernels/attention_tangent.h"
#include "csrc_cpu/kernels/elementwise.h"
#include "csrc_cpu/kernels/fake_quantize.h"
#include "csrc_cpu/kernels/layer_norm.h"

namespace bitfall {

struct KernelTable {
  const AdamKernels* adam;
  const AttentionKernels* attention;
  const AttentionTangentKernels* attention_tangent;
  const ElementwiseKernels* elementwise;
  const FakeQuantizeKernels* fake_quantize;
  const LayerNormKernels* layer_norm;
};

/// Table of one instruction set (tests compare them). The CPU must support it.
const KernelTable& kernel_table(CpuIsa isa);

}  // namespace bitfall
