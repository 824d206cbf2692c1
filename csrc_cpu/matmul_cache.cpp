#include "csrc_cpu/matmul_cache.h"

#include <dnnl.hpp>
#include <map>

namespace bitfall {
namespace {

dnnl::memory::data_type data_type(DType dtype) {
  return dtype == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

dnnl::memory::desc matrix(std::int64_t rows, std::int64_t columns, DType dtype,
                          Transpose transpose) {
  const dnnl::memory::dims strides =
      transpose == Transpose::yes ? dnnl::memory::dims{1, rows} : dnnl::memory::dims{columns, 1};
  return {{rows, columns}, data_type(dtype), strides};
}

dnnl::matmul::primitive_desc describe(const MatmulSpec& spec, const dnnl::engine& engine) {
  const auto a = matrix(spec.m, spec.k, spec.operands, spec.a);
  const auto b = matrix(spec.k, spec.n, spec.operands, spec.b);
  const auto bias =
      spec.has_bias ? matrix(1, spec.n, spec.operands, Transpose::no) : dnnl::memory::desc();
  const auto c = matrix(spec.m, spec.n, spec.result, Transpose::no);
  dnnl::primitive_attr attributes;
  if (spec.accumulate == Accumulate::yes) {
    dnnl::post_ops post_ops;
    post_ops.append_sum(1.0f);
    attributes.set_post_ops(post_ops);
  }
#if DNNL_VERSION_MAJOR >= 3
  return spec.has_bias ? dnnl::matmul::primitive_desc(engine, a, b, bias, c, attributes)
                       : dnnl::matmul::primitive_desc(engine, a, b, c, attributes);
#else
  const auto description =
      spec.has_bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c);
  return {description, attributes, engine};
#endif
}

}  // namespace

struct MatmulCache::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<MatmulSpec, dnnl::matmul> primitives;
};

MatmulCache::MatmulCache() : state_(std::make_unique<State>()) {}
MatmulCache::~MatmulCache() = default;

bool MatmulCache::is_native(DType dtype) const {
  return dtype == DType::f32 ||
         (dtype == DType::bf16 && dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core_bf16);
}

void MatmulCache::run(const MatmulSpec& spec, const void* a, const void* b, const void* bias,
                      void* c) try {
  auto found = state_->primitives.find(spec);
  if (found == state_->primitives.end()) {
    const dnnl::matmul primitive(describe(spec, state_->engine));
    found = state_->primitives.emplace(spec, primitive).first;
  }
  const auto memory = [&](std::int64_t rows, std::int64_t columns, DType dtype, Transpose transpose,
                          const void* data) {
    return dnnl::memory(matrix(rows, columns, dtype, transpose), state_->engine,
                        const_cast<void*>(data));
  };
  std::unordered_map<int, dnnl::memory> arguments{
      {DNNL_ARG_SRC, memory(spec.m, spec.k, spec.operands, spec.a, a)},
      {DNNL_ARG_WEIGHTS, memory(spec.k, spec.n, spec.operands, spec.b, b)},
      {DNNL_ARG_DST, memory(spec.m, spec.n, spec.result, Transpose::no, c)}};
  if (spec.has_bias)
    arguments.emplace(DNNL_ARG_BIAS, memory(1, spec.n, spec.operands, Transpose::no, bias));
  found->second.execute(state_->stream, arguments);
  state_->stream.wait();
} catch (const dnnl::error& error) {
  throw BackendError(concat("oneDNN product [", spec.m, ", ", spec.k, "] x [", spec.k, ", ", spec.n,
                            "] in ", name(spec.operands), " failed: ", error.what()));
}

}  // namespace bitfall
