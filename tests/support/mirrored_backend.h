// A backend of another device behind tensors in host memory, so that one test body serves both.
//
// Each buffer exists twice. An operation copies the buffers of its arguments to the device, whole,
// so that offsets, overlaps and what lies around a tensor stay as they are; runs there; and copies
// them back. Tests read and write host memory as they do on the CPU.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/backend.h"

namespace bitfall::test {

class MirroredBackend final : public Backend {
 public:
  explicit MirroredBackend(std::unique_ptr<Backend> device) : device_(std::move(device)) {}

  Device device() const override { return Device::cpu; }

  Buffer allocate(std::size_t bytes) override {
    constexpr std::size_t kAlignment = 64;
    const std::size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
    std::shared_ptr<void> memory(std::aligned_alloc(kAlignment, rounded), std::free);
    std::memset(memory.get(), 0, rounded);
    mirrors_.push_back({memory, bytes, device_->allocate(bytes)});
    return {memory, bytes, Device::cpu};
  }
  void copy(const Tensor& source, const Tensor& destination) override {
    run([&](auto& on) { device_->copy(on(source), on(destination)); });
  }
  void synchronize() override { device_->synchronize(); }
  void fill_zero(const Tensor& destination) override {
    run([&](auto& on) { device_->fill_zero(on(destination)); });
  }
  void cast(const Tensor& source, const Tensor& destination) override {
    run([&](auto& on) { device_->cast(on(source), on(destination)); });
  }
  void linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y,
                      Accumulate accumulate) override {
    run([&](auto& on) { device_->linear_forward(on(x), on(weight), on(bias), on(y), accumulate); });
  }
  void linear_activation_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 Activation activation, const Tensor& pre_activation,
                                 const Tensor& y) override {
    run([&](auto& on) {
      device_->linear_activation_forward(on(x), on(weight), on(bias), activation,
                                         on(pre_activation), on(y));
    });
  }
  void linear_backward_input(const Tensor& dy, const Tensor& weight, const Tensor& dx,
                             Accumulate accumulate) override {
    run([&](auto& on) { device_->linear_backward_input(on(dy), on(weight), on(dx), accumulate); });
  }
  void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                              const Tensor& dbias, Accumulate accumulate) override {
    run([&](auto& on) {
      device_->linear_backward_weight(on(dy), on(x), on(dweight), on(dbias), accumulate);
    });
  }
  void activation_backward(Activation activation, const Tensor& pre_activation, const Tensor& dy,
                           const Tensor& dpre, const Tensor& y) override {
    run([&](auto& on) {
      device_->activation_backward(activation, on(pre_activation), on(dy), on(dpre), on(y));
    });
  }
  void activation_backward_tangent(Activation activation, const Tensor& pre_activation,
                                   const Tensor& pre_activation_tangent, const Tensor& dy,
                                   const Tensor& dy_tangent, const Tensor& dpre_tangent) override {
    run([&](auto& on) {
      device_->activation_backward_tangent(activation, on(pre_activation),
                                           on(pre_activation_tangent), on(dy), on(dy_tangent),
                                           on(dpre_tangent));
    });
  }
  void attention_forward(const AttentionShape& shape, const Tensor& qkv,
                         const Tensor& sequence_starts, const Tensor& sample_keys,
                         const Dropout& dropout, const Tensor& out,
                         const Tensor& log_sum_exp) override {
    run([&](auto& on) {
      device_->attention_forward(shape_on(on, shape), on(qkv), on(sequence_starts), on(sample_keys),
                                 dropout, on(out), on(log_sum_exp));
    });
  }
  void attention_backward(const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                          const Tensor& out, const Tensor& log_sum_exp,
                          const Tensor& sequence_starts, const Tensor& sample_keys,
                          const Dropout& dropout, const Tensor& dqkv) override {
    run([&](auto& on) {
      device_->attention_backward(shape_on(on, shape), on(dout), on(qkv), on(out), on(log_sum_exp),
                                  on(sequence_starts), on(sample_keys), dropout, on(dqkv));
    });
  }
  void attention_forward_tangent(const AttentionShape& shape, const AttentionTangents& tangents,
                                 const Tensor& sequence_starts) override {
    run([&](auto& on) {
      device_->attention_forward_tangent(shape_on(on, shape), tangents_on(on, tangents),
                                         on(sequence_starts));
    });
  }
  void attention_backward_tangent(const AttentionShape& shape, const AttentionTangents& tangents,
                                  const Tensor& dout, const Tensor& dout_tangent,
                                  const Tensor& sequence_starts,
                                  const Tensor& dqkv_tangent) override {
    run([&](auto& on) {
      device_->attention_backward_tangent(shape_on(on, shape), tangents_on(on, tangents), on(dout),
                                          on(dout_tangent), on(sequence_starts), on(dqkv_tangent));
    });
  }
  void layer_norm_forward(const LayerNormForward& args) override {
    run([&](auto& on) {
      LayerNormForward there = args;
      for (Tensor* tensor : {&there.x, &there.residual, &there.gamma, &there.beta, &there.row_keys,
                             &there.sum, &there.mean_rstd, &there.y})
        *tensor = on(*tensor);
      device_->layer_norm_forward(there);
    });
  }
  void layer_norm_backward(const LayerNormBackward& args) override {
    run([&](auto& on) {
      LayerNormBackward there = args;
      for (Tensor* tensor : {&there.dy, &there.sum, &there.mean_rstd, &there.gamma, &there.row_keys,
                             &there.dresidual, &there.dx, &there.dgamma, &there.dbeta})
        *tensor = on(*tensor);
      device_->layer_norm_backward(there);
    });
  }
  void layer_norm_forward_tangent(const LayerNormForwardTangent& args) override {
    run([&](auto& on) {
      LayerNormForwardTangent there = args;
      for (Tensor* tensor : {&there.sum, &there.mean_rstd, &there.gamma, &there.sum_tangent,
                             &there.gamma_tangent, &there.beta_tangent, &there.y_tangent})
        *tensor = on(*tensor);
      device_->layer_norm_forward_tangent(there);
    });
  }
  void layer_norm_backward_tangent(const LayerNormBackwardTangent& args) override {
    run([&](auto& on) {
      LayerNormBackwardTangent there = args;
      for (Tensor* tensor : {&there.sum, &there.mean_rstd, &there.sum_tangent, &there.gamma,
                             &there.gamma_tangent, &there.dy, &there.dy_tangent,
                             &there.dsum_tangent, &there.dgamma_tangent, &there.dbeta_tangent})
        *tensor = on(*tensor);
      device_->layer_norm_backward_tangent(there);
    });
  }
  void embedding_forward(const EmbeddingIds& ids, const EmbeddingTables& tables,
                         const Tensor& y) override {
    run([&](auto& on) {
      device_->embedding_forward({on(ids.input_ids), on(ids.position_ids), on(ids.token_type_ids)},
                                 {on(tables.word), on(tables.position), on(tables.token_type)},
                                 on(y));
    });
  }
  void embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                          const EmbeddingTables& gradients) override {
    run([&](auto& on) {
      device_->embedding_backward(
          {on(ids.input_ids), on(ids.position_ids), on(ids.token_type_ids)}, on(dy),
          {on(gradients.word), on(gradients.position), on(gradients.token_type)});
    });
  }
  void gather_rows(const Tensor& x, const Tensor& row_index, const Tensor& y) override {
    run([&](auto& on) { device_->gather_rows(on(x), on(row_index), on(y)); });
  }
  void scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) override {
    run([&](auto& on) { device_->scatter_rows(on(dy), on(row_index), on(dx)); });
  }
  void dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
               const Tensor& y) override {
    run([&](auto& on) { device_->dropout(dropout, on(row_keys), on(x), on(y)); });
  }
  void cross_entropy_forward(const Tensor& logits, const Tensor& labels,
                             const Tensor& loss) override {
    run([&](auto& on) { device_->cross_entropy_forward(on(logits), on(labels), on(loss)); });
  }
  void cross_entropy_backward(const Tensor& logits, const Tensor& labels, float scale,
                              const Tensor& dlogits) override {
    run([&](auto& on) {
      device_->cross_entropy_backward(on(logits), on(labels), scale, on(dlogits));
    });
  }
  void cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                      float scale, const Tensor& dlogits_tangent) override {
    run([&](auto& on) {
      device_->cross_entropy_backward_tangent(on(logits), on(logits_tangent), scale,
                                              on(dlogits_tangent));
    });
  }
  void mean_squared_error_forward(const Tensor& predictions, const Tensor& labels,
                                  const Tensor& loss) override {
    run([&](auto& on) {
      device_->mean_squared_error_forward(on(predictions), on(labels), on(loss));
    });
  }
  void mean_squared_error_backward(const Tensor& predictions, const Tensor& labels, float scale,
                                   const Tensor& dpredictions) override {
    run([&](auto& on) {
      device_->mean_squared_error_backward(on(predictions), on(labels), scale, on(dpredictions));
    });
  }
  void span_cross_entropy_forward(const Tensor& logits, const Tensor& sequence_starts,
                                  const Tensor& span_positions, const Tensor& loss) override {
    run([&](auto& on) {
      device_->span_cross_entropy_forward(on(logits), on(sequence_starts), on(span_positions),
                                          on(loss));
    });
  }
  void span_cross_entropy_backward(const Tensor& logits, const Tensor& sequence_starts,
                                   const Tensor& span_positions, float scale,
                                   const Tensor& dlogits) override {
    run([&](auto& on) {
      device_->span_cross_entropy_backward(on(logits), on(sequence_starts), on(span_positions),
                                           scale, on(dlogits));
    });
  }
  void span_cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                           const Tensor& sequence_starts, float scale,
                                           const Tensor& dlogits_tangent) override {
    run([&](auto& on) {
      device_->span_cross_entropy_backward_tangent(on(logits), on(logits_tangent),
                                                   on(sequence_starts), scale, on(dlogits_tangent));
    });
  }
  double squared_sum(const Tensor& x) override {
    double sum = 0;
    run([&](auto& on) { sum = device_->squared_sum(on(x)); });
    return sum;
  }
  void decide_update(const Tensor& loss, const Tensor& gradient, const UpdateLimits& limits,
                     const Tensor& decision) override {
    run([&](auto& on) { device_->decide_update(on(loss), on(gradient), limits, on(decision)); });
  }
  void decide_update(const Tensor& loss, double squared_norm, const UpdateLimits& limits,
                     const Tensor& decision) override {
    run([&](auto& on) { device_->decide_update(on(loss), squared_norm, limits, on(decision)); });
  }
  UpdateDecision last_decision() override { return device_->last_decision(); }
  double dot(const Tensor& x, const Tensor& y) override {
    double sum = 0;
    run([&](auto& on) { sum = device_->dot(on(x), on(y)); });
    return sum;
  }
  void axpby(float alpha, const Tensor& x, float beta, const Tensor& y) override {
    run([&](auto& on) { device_->axpby(alpha, on(x), beta, on(y)); });
  }
  void adam_update(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                   std::span<const FakeQuantizeRange> published, const Tensor& working) override {
    run([&](auto& on) {
      device_->adam_update(ranges,
                           {on(tensors.decision), on(tensors.gradient), on(tensors.master),
                            on(tensors.exp_avg), on(tensors.exp_avg_sq)},
                           published, on(working));
    });
  }
  void fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                     const Tensor& working) override {
    run([&](auto& on) { device_->fake_quantize(ranges, on(master), on(working)); });
  }

 private:
  struct Mirror {
    std::shared_ptr<void> host;
    std::size_t bytes;
    Buffer device;

    Tensor on_host() const { return view(host.get(), Device::cpu); }
    Tensor on_device() const { return view(device.memory().get(), Device::cuda); }

   private:
    Tensor view(void* data, Device where) const {
      return {data, DType::s8, Shape{static_cast<std::int64_t>(bytes)}, where};
    }
  };

  /// Turns tensors in host memory into those on the device, and remembers their buffers.
  class Arguments {
   public:
    explicit Arguments(MirroredBackend& backend) : backend_(backend) {}

    /// An absent tensor stays absent, one in memory of another origin stays where it is.
    Tensor operator()(const Tensor& tensor) {
      for (Mirror& mirror : backend_.mirrors_) {
        const auto* begin = static_cast<const std::byte*>(mirror.host.get());
        const auto* data = static_cast<const std::byte*>(tensor.data);
        if (data < begin || data >= begin + mirror.bytes) continue;
        backend_.device_->copy(mirror.on_host(), mirror.on_device());
        used_.push_back(&mirror);
        auto* there = static_cast<std::byte*>(mirror.device.memory().get()) + (data - begin);
        return {there, tensor.dtype, tensor.shape, Device::cuda};
      }
      return tensor;
    }

    void copy_back() const {
      for (const Mirror* mirror : used_)
        backend_.device_->copy(mirror->on_device(), mirror->on_host());
    }

   private:
    MirroredBackend& backend_;
    std::vector<Mirror*> used_;
  };

  static AttentionShape shape_on(Arguments& on, const AttentionShape& shape) {
    return {shape.num_attention_heads, shape.head_size, on(shape.key_lengths)};
  }
  static AttentionTangents tangents_on(Arguments& on, const AttentionTangents& tangents) {
    return {on(tangents.qkv),         on(tangents.qkv_tangent), on(tangents.out),
            on(tangents.out_tangent), on(tangents.log_sum_exp), on(tangents.log_sum_exp_tangent)};
  }

  template <typename Body>
  void run(const Body& body) {
    Arguments arguments(*this);
    body(arguments);
    arguments.copy_back();
  }

  std::unique_ptr<Backend> device_;
  std::vector<Mirror> mirrors_;
};

}  // namespace bitfall::test
