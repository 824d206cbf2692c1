// Compiled without fused multiply-add (see CMakeLists.txt).
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/tile_kernel.cuh"

namespace bitfall {
namespace {

/// Masters as they are.
struct MasterSource {
  static constexpr int kBlocksPerProcessor = 4;
  const float* master;

  __device__ void load(const Item& item, Tile& tile) const { load_tile(item, master, tile); }
};

}  // namespace

const QuantizeTable& CudaBackend::tile_table(std::span<const TileRange> ranges) {
  int processors = 0;
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_index_),
             "cudaDeviceGetAttribute");
  quantize_table_->set(*this, ranges, processors);
  return *quantize_table_;
}

void CudaBackend::fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                                const Tensor& working) {
  check_fake_quantize(ranges, master, working);
  std::vector<TileRange> tiles;
  for (const FakeQuantizeRange& range : ranges) tiles.push_back({range});
  const QuantizeTable& table = tile_table(tiles);
  if (table.items() == 0) return;
  visit_dtype(working.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run_tiles("fake_quantize", table, MasterSource{device_data<const float>(master)},
              device_data<T>(working), scratch(tile_scratch_bytes(table)), stream());
  });
}

}  // namespace bitfall
