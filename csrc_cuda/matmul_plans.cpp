#include "csrc_cuda/matmul_plans.h"

#include <algorithm>

#include "core/lru_cache.h"

namespace bitfall {
namespace {

constexpr std::size_t kMostPlans = 1024;

using Handle = OwnedHandle<cublasLtHandle_t, cublasLtDestroy>;
using Description = OwnedHandle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = OwnedHandle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = OwnedHandle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

/// Whatever a plan depends on besides MatmulSpec: how well each operand is aligned.
struct PlanKey {
  std::int64_t rows, columns, depth;
  Stored left, right;
  DType dtype, result_dtype;
  bool has_bias;
  std::uint32_t left_alignment, right_alignment, y_alignment;

  auto operator<=>(const PlanKey&) const = default;
};

/// cuBLAS counts matrices column by column, so it sees every row-major matrix transposed, and
/// y^T = right^T left^T: its A is `right`, its B is `left`.
struct Plan {
  Description description;
  Layout a, b, y;
  cublasLtMatmulAlgo_t algorithm;
};

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

/// The largest power of two up to 256 that divides the address.
std::uint32_t alignment(const void* data) {
  const auto address = reinterpret_cast<std::uintptr_t>(data) | 256u;
  return static_cast<std::uint32_t>(address & (~address + 1));
}

PlanKey key_of(const MatmulSpec& spec, const MatmulOperands& operands) {
  return {spec.rows,
          spec.columns,
          spec.depth,
          spec.left,
          spec.right,
          spec.dtype,
          spec.result_dtype,
          operands.bias != nullptr,
          alignment(operands.left),
          alignment(operands.right),
          alignment(operands.y)};
}

template <typename Value>
void set(const Description& description, cublasLtMatmulDescAttributes_t attribute, Value value) {
  cublas_check(cublasLtMatmulDescSetAttribute(description.get(), attribute, &value, sizeof(value)),
               "cublasLtMatmulDescSetAttribute");
}

template <typename Value>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute,
         Value value) {
  cublas_check(
      cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof(value)),
      "cublasLtMatmulPreferenceSetAttribute");
}

Description describe(const PlanKey& key, const void* bias) {
  cublasLtMatmulDesc_t created = nullptr;
  cublas_check(cublasLtMatmulDescCreate(&created, CUBLAS_COMPUTE_32F, CUDA_R_32F),
               "cublasLtMatmulDescCreate");
  Description description(created);
  const auto operation = [](Stored stored) {
    return stored == Stored::as_is ? CUBLAS_OP_N : CUBLAS_OP_T;
  };
  set(description, CUBLASLT_MATMUL_DESC_TRANSA, operation(key.right));
  set(description, CUBLASLT_MATMUL_DESC_TRANSB, operation(key.left));
  if (key.has_bias) {
    set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  return description;
}

/// A row-major matrix of `rows` x `columns` as it lies in memory.
Layout layout_of(std::int64_t rows, std::int64_t columns, DType dtype) {
  cublasLtMatrixLayout_t created = nullptr;
  cublas_check(
      cublasLtMatrixLayoutCreate(&created, cuda_type(dtype), static_cast<std::uint64_t>(columns),
                                 static_cast<std::uint64_t>(rows), columns),
      "cublasLtMatrixLayoutCreate");
  return Layout(created);
}

Layout layout_of(Stored stored, std::int64_t rows, std::int64_t columns, DType dtype) {
  return stored == Stored::as_is ? layout_of(rows, columns, dtype)
                                 : layout_of(columns, rows, dtype);
}

Preference preference_of(const PlanKey& key) {
  cublasLtMatmulPreference_t created = nullptr;
  cublas_check(cublasLtMatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate");
  Preference preference(created);
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
      static_cast<std::uint64_t>(MatmulPlans::kWorkspaceBytes));
  // Parts of a split sum are added in f32 and in a fixed order.
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.right_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.left_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.y_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.y_alignment);
  return preference;
}

Plan make_plan(cublasLtHandle_t handle, const PlanKey& key, const void* bias) {
  Plan plan{describe(key, bias),
            layout_of(key.right, key.depth, key.columns, key.dtype),
            layout_of(key.left, key.rows, key.depth, key.dtype),
            layout_of(key.rows, key.columns, key.result_dtype),
            {}};
  const Preference preference = preference_of(key);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t code = cublasLtMatmulAlgoGetHeuristic(
      handle, plan.description.get(), plan.a.get(), plan.b.get(), plan.y.get(), plan.y.get(),
      preference.get(), 1, &result, &found);
  check<BackendError>(
      code == CUBLAS_STATUS_SUCCESS && found > 0 && result.state == CUBLAS_STATUS_SUCCESS,
      "cuBLASLt has no algorithm for [", key.rows, ", ", key.depth, "] x [", key.depth, ", ",
      key.columns, "] in ", name(key.dtype), " to ", name(key.result_dtype),
      key.has_bias ? " with bias" : "", ": ", cublasLtGetStatusString(code),
      "; try another compute dtype");
  plan.algorithm = result.algo;
  return plan;
}

}  // namespace

struct MatmulPlans::State {
  Handle handle;
  LruCache<PlanKey, Plan> plans{kMostPlans};
};

MatmulPlans::MatmulPlans() : state_(std::make_unique<State>()) {
  cublasLtHandle_t handle = nullptr;
  cublas_check(cublasLtCreate(&handle), "cublasLtCreate");
  state_->handle.reset(handle);
}

MatmulPlans::~MatmulPlans() = default;

void MatmulPlans::multiply(const MatmulSpec& spec, const MatmulOperands& operands, void* workspace,
                           cudaStream_t stream) {
  const PlanKey key = key_of(spec, operands);
  const Plan& plan =
      state_->plans.get(key, [&] { return make_plan(state_->handle.get(), key, operands.bias); });
  if (key.has_bias) set(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias);
  const float alpha = 1.0f, beta = spec.accumulate == Accumulate::yes ? 1.0f : 0.0f;
  const cublasStatus_t code =
      cublasLtMatmul(state_->handle.get(), plan.description.get(), &alpha, operands.right,
                     plan.a.get(), operands.left, plan.b.get(), &beta, operands.y, plan.y.get(),
                     operands.y, plan.y.get(), &plan.algorithm, workspace, kWorkspaceBytes, stream);
  check<BackendError>(code == CUBLAS_STATUS_SUCCESS, "product [", spec.rows, ", ", spec.depth,
                      "] x [", spec.depth, ", ", spec.columns, "] in ", name(spec.dtype),
                      " failed on the GPU: ", cublasLtGetStatusName(code), " (",
                      cublasLtGetStatusString(code), ")");
}

}  // namespace bitfall
