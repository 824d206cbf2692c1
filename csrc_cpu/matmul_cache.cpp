#include "csrc_cpu/matmul_cache.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <dnnl.hpp>
#include <exception>
#include <unordered_map>
#include <vector>

#include "core/lru_cache.h"

namespace bitfall {
namespace {

using Arguments = std::unordered_map<int, dnnl::memory>;

constexpr std::int64_t kPieceRows = 64;
constexpr std::int64_t kFewestPieceRows = 16;
/// Below this, packing the weights costs more than it gains.
constexpr std::int64_t kPackingRows = 256;
constexpr std::size_t kMostPrimitives = 256;  ///< about 70 KB each

dnnl::memory::data_type data_type(DType dtype) {
  return dtype == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

dnnl::memory::desc matrix(std::int64_t rows, std::int64_t columns, DType dtype,
                          Transpose transpose = Transpose::no) {
  const dnnl::memory::dims strides =
      transpose == Transpose::yes ? dnnl::memory::dims{1, rows} : dnnl::memory::dims{columns, 1};
  return {{rows, columns}, data_type(dtype), strides};
}

/// Any layout: oneDNN chooses its favourite.
dnnl::memory::desc any_matrix(std::int64_t rows, std::int64_t columns, DType dtype) {
  return {{rows, columns}, data_type(dtype), dnnl::memory::format_tag::any};
}

/// The scratchpad is ours: oneDNN's own belongs to the thread that created the primitive.
dnnl::primitive_attr attributes(Accumulate accumulate) {
  dnnl::primitive_attr result;
  result.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (accumulate == Accumulate::yes) {
    dnnl::post_ops post_ops;
    post_ops.append_sum(1.0f);
    result.set_post_ops(post_ops);
  }
  return result;
}

dnnl::matmul::primitive_desc describe(const MatmulSpec& spec, std::int64_t rows,
                                      const dnnl::memory::desc& weight,
                                      const dnnl::engine& engine) {
  const auto x = matrix(rows, spec.k, spec.dtype);
  const auto bias = spec.has_bias ? matrix(1, spec.n, spec.dtype) : dnnl::memory::desc();
  const auto y = matrix(rows, spec.n, spec.dtype);
#if DNNL_VERSION_MAJOR >= 3
  return spec.has_bias
             ? dnnl::matmul::primitive_desc(engine, x, weight, bias, y, attributes(spec.accumulate))
             : dnnl::matmul::primitive_desc(engine, x, weight, y, attributes(spec.accumulate));
#else
  const auto description =
      spec.has_bias ? dnnl::matmul::desc(x, weight, bias, y) : dnnl::matmul::desc(x, weight, y);
  return {description, attributes(spec.accumulate), engine};
#endif
}

dnnl::inner_product_backward_weights::primitive_desc describe(const WeightGradientSpec& spec,
                                                              const dnnl::engine& engine) {
  const auto x = matrix(spec.rows, spec.k, spec.dtype);
  const auto dy = matrix(spec.rows, spec.n, spec.dtype);
  const auto weight = any_matrix(spec.n, spec.k, spec.dtype);
  const auto dweight = matrix(spec.n, spec.k, DType::f32);
  const auto kind = dnnl::prop_kind::forward_training;
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::inner_product_forward::primitive_desc hint(engine, kind, x, weight, dy);
  return {engine, x, dweight, dy, hint, attributes(Accumulate::no)};
#else
  const dnnl::inner_product_forward::primitive_desc hint({kind, x, weight, dy}, engine);
  return {{x, dweight, dy}, attributes(Accumulate::no), engine, hint};
#endif
}

/// Rows of every piece but the last: pieces are even, so that no thread waits long.
std::int64_t piece_rows(std::int64_t rows, std::int64_t threads) {
  const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t even = divide_up(divide_up(rows, kPieceRows), threads) * threads;
  const std::int64_t most = std::max<std::int64_t>(1, rows / kFewestPieceRows);
  return divide_up(rows, std::min(even, most));
}

/// Primitives created inside run on the thread that executes them.
class OneThread {
 public:
  OneThread() : threads_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(threads_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int threads_;
};

/// Memory aligned to a cache line; grows and is kept, loses its contents when it grows.
class Workspace {
 public:
  void* at_least(std::size_t bytes) {
    if (bytes > bytes_) {
      memory_.reset(
          std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
      bytes_ = memory_ ? bytes : 0;
      check<BackendError>(memory_ != nullptr, "no memory for ", bytes, " bytes of work space");
    }
    return memory_.get();
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

enum class Layout { plain, packed };

struct PieceKey {
  MatmulSpec spec;
  std::int64_t rows;
  Layout layout;

  auto operator<=>(const PieceKey&) const = default;
};

struct Piece {
  dnnl::matmul primitive;
  dnnl::memory::desc weight, scratchpad;
};

struct Packing {
  dnnl::reorder primitive;
  dnnl::memory::desc packed, scratchpad;
};

struct Gradient {
  dnnl::inner_product_backward_weights primitive;
  dnnl::memory::desc scratchpad;
};

struct Worker {
  dnnl::stream stream;
  Workspace scratchpad;
};

}  // namespace

struct MatmulCache::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  LruCache<PieceKey, Piece> pieces{kMostPrimitives};
  LruCache<MatmulSpec, Packing> packings{kMostPrimitives};
  LruCache<WeightGradientSpec, Gradient> gradients{kMostPrimitives};
  std::vector<Worker> workers;  ///< one per thread
  Workspace packed_weight;

  dnnl::memory memory(const dnnl::memory::desc& description, const void* data) const {
    return {description, engine, const_cast<void*>(data)};
  }
  void grow_workers(int threads) {
    while (workers.size() < static_cast<std::size_t>(threads))
      workers.push_back({dnnl::stream(engine), {}});
  }
  void execute(Worker& worker, const dnnl::primitive& primitive,
               const dnnl::memory::desc& scratchpad, Arguments& arguments) const {
    arguments[DNNL_ARG_SCRATCHPAD] =
        memory(scratchpad, worker.scratchpad.at_least(scratchpad.get_size()));
    primitive.execute(worker.stream, arguments);
    worker.stream.wait();
  }
  const Packing& packing(const MatmulSpec& spec);
  const Piece& piece(const PieceKey& key);
  const void* pack(const MatmulSpec& spec, const void* weight);
  void run_piece(Worker& worker, const Piece& piece, const MatmulSpec& spec,
                 const MatmulOperands& operands, std::int64_t begin, std::int64_t end) const;
};

/// How to bring a weight into the layout that pieces of kPieceRows rows like best; shorter pieces
/// take the same.
const Packing& MatmulCache::State::packing(const MatmulSpec& spec) {
  return packings.get(spec, [&]() -> Packing {
    const auto packed = [&] {
      const OneThread one_thread;
      return describe(spec, kPieceRows, any_matrix(spec.k, spec.n, spec.dtype), engine)
          .weights_desc();
    }();
    const dnnl::reorder::primitive_desc description(
        engine, matrix(spec.k, spec.n, spec.dtype, spec.transpose), engine, packed,
        attributes(Accumulate::no));
    return {dnnl::reorder(description), packed, description.scratchpad_desc()};
  });
}

const Piece& MatmulCache::State::piece(const PieceKey& key) {
  return pieces.get(key, [&]() -> Piece {
    const MatmulSpec& spec = key.spec;
    const dnnl::memory::desc weight = key.layout == Layout::packed
                                          ? packing(spec).packed
                                          : matrix(spec.k, spec.n, spec.dtype, spec.transpose);
    const OneThread one_thread;
    const auto description = describe(spec, key.rows, weight, engine);
    return {dnnl::matmul(description), weight, description.scratchpad_desc()};
  });
}

/// The weight in its favourite layout; valid until the next call.
const void* MatmulCache::State::pack(const MatmulSpec& spec, const void* weight) {
  const Packing& chosen = packing(spec);
  void* packed = packed_weight.at_least(chosen.packed.get_size());
  Arguments arguments{
      {DNNL_ARG_FROM, memory(matrix(spec.k, spec.n, spec.dtype, spec.transpose), weight)},
      {DNNL_ARG_TO, memory(chosen.packed, packed)}};
  execute(workers[0], chosen.primitive, chosen.scratchpad, arguments);
  return packed;
}

void MatmulCache::State::run_piece(Worker& worker, const Piece& piece, const MatmulSpec& spec,
                                   const MatmulOperands& operands, std::int64_t begin,
                                   std::int64_t end) const {
  const auto rows = [&](const void* data, std::int64_t columns) {
    const std::int64_t row_bytes = columns * static_cast<std::int64_t>(size_in_bytes(spec.dtype));
    return memory(matrix(end - begin, columns, spec.dtype),
                  static_cast<const std::byte*>(data) + begin * row_bytes);
  };
  Arguments arguments{{DNNL_ARG_SRC, rows(operands.x, spec.k)},
                      {DNNL_ARG_WEIGHTS, memory(piece.weight, operands.weight)},
                      {DNNL_ARG_DST, rows(operands.y, spec.n)}};
  if (spec.has_bias)
    arguments[DNNL_ARG_BIAS] = memory(matrix(1, spec.n, spec.dtype), operands.bias);
  execute(worker, piece.primitive, piece.scratchpad, arguments);
}

MatmulCache::MatmulCache() : state_(std::make_unique<State>()) {
  // What is evicted here shall go: oneDNN would hold another 1024 primitives.
  dnnl::set_primitive_cache_capacity(0);
}

MatmulCache::~MatmulCache() = default;

bool MatmulCache::is_native(DType dtype) const {
  if (dtype == DType::f32) return true;
  // The values are sets of features, not an order: AVX2_VNNI is the larger number.
  const auto wanted = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  const auto present = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  return dtype == DType::bf16 && (present & wanted) == wanted;
}

void MatmulCache::multiply(const MatmulSpec& spec, const MatmulOperands& operands,
                           const AfterRows& after) try {
  const std::int64_t rows = operands.rows;
  const int threads = omp_get_max_threads();
  state_->grow_workers(threads);
  const Layout layout = rows < kPackingRows ? Layout::plain : Layout::packed;
  MatmulOperands packed = operands;
  if (layout == Layout::packed) packed.weight = state_->pack(spec, operands.weight);
  const std::int64_t size = piece_rows(rows, threads);
  const std::int64_t count = (rows + size - 1) / size;
  const Piece whole = state_->piece({spec, size, layout});
  const Piece last = state_->piece({spec, rows - (count - 1) * size, layout});
  std::exception_ptr failure;
#pragma omp parallel for schedule(static) if (count > 1)
  for (std::int64_t index = 0; index < count; ++index) {
    try {
      Worker& worker = state_->workers[static_cast<std::size_t>(omp_get_thread_num())];
      const std::int64_t begin = index * size, end = std::min(rows, begin + size);
      state_->run_piece(worker, index + 1 == count ? last : whole, spec, packed, begin, end);
      if (after) after(begin, end);
    } catch (...) {
#pragma omp critical(bitfall_matmul_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
} catch (const dnnl::error& error) {
  throw BackendError(concat("oneDNN product [", operands.rows, ", ", spec.k, "] x [", spec.k, ", ",
                            spec.n, "] in ", name(spec.dtype), " failed: ", error.what()));
}

void MatmulCache::weight_gradient(const WeightGradientSpec& spec, const void* dy, const void* x,
                                  float* dweight) try {
  state_->grow_workers(1);
  const Gradient& gradient = state_->gradients.get(spec, [&]() -> Gradient {
    const auto description = describe(spec, state_->engine);
    return {dnnl::inner_product_backward_weights(description), description.scratchpad_desc()};
  });
  Arguments arguments{
      {DNNL_ARG_SRC, state_->memory(matrix(spec.rows, spec.k, spec.dtype), x)},
      {DNNL_ARG_DIFF_DST, state_->memory(matrix(spec.rows, spec.n, spec.dtype), dy)},
      {DNNL_ARG_DIFF_WEIGHTS, state_->memory(matrix(spec.n, spec.k, DType::f32), dweight)}};
  state_->execute(state_->workers[0], gradient.primitive, gradient.scratchpad, arguments);
} catch (const dnnl::error& error) {
  throw BackendError(concat("oneDNN product [", spec.n, ", ", spec.rows, "] x [", spec.rows, ", ",
                            spec.k, "] in ", name(spec.dtype), " failed: ", error.what()));
}

}  // namespace bitfall
