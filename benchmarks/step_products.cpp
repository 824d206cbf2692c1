// Worker: only the matrix products of one MiniLM-L6 training step, with oneDNN.
//
// Usage: step_products f32|bf16 [layers hidden_size heads feed_forward batch length]. For each
// product the faster of oneDNN's matmul and inner_product primitives is taken, measured once at
// start. Answers each input line with
// {"seconds": all products, "linear_seconds": without attention's batched products, "flops": ...}.
#include <chrono>
#include <dnnl.hpp>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace {

using dnnl::memory;
using Clock = std::chrono::steady_clock;

const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
dnnl::stream stream(engine);

double seconds_of(const std::function<void()>& work) {
  const auto begin = Clock::now();
  work();
  stream.wait();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

using Product = std::function<void()>;

/// One primitive with memory of its own for every argument.
template <typename Primitive, typename Descriptor>
Product bound(const Descriptor& descriptor,
              const std::vector<std::pair<int, memory::desc>>& arguments) {
  std::unordered_map<int, memory> memories;
  for (const auto& [argument, layout] : arguments) {
    memory block(layout, engine);
    std::fill_n(static_cast<char*>(block.get_data_handle()), layout.get_size(), 0);
    memories.emplace(argument, block);
  }
  return [primitive = Primitive(descriptor), memories] { primitive.execute(stream, memories); };
}

/// c = a b with strides given in elements; batched when there are three dimensions.
Product matmul(const memory::desc& a, const memory::desc& b, const memory::desc& c) {
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc descriptor(engine, a, b, c);
#else
  const dnnl::matmul::primitive_desc descriptor({a, b, c}, engine);
#endif
  return bound<dnnl::matmul>(descriptor,
                             {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
}

struct InnerProducts {
  Product forward, backward_data, backward_weights;
};

InnerProducts inner_products(memory::dim rows, memory::dim outputs, memory::dim inputs,
                             memory::data_type type) {
  using Tag = memory::format_tag;
  const memory::desc x({rows, inputs}, type, Tag::ab), y({rows, outputs}, type, Tag::ab);
  const memory::desc weight({outputs, inputs}, type, Tag::any);
  const memory::desc gradient({outputs, inputs}, memory::data_type::f32, Tag::ab);
  using Forward = dnnl::inner_product_forward;
  using Data = dnnl::inner_product_backward_data;
  using Weights = dnnl::inner_product_backward_weights;
#if DNNL_VERSION_MAJOR >= 3
  const Forward::primitive_desc forward(engine, dnnl::prop_kind::forward_training, x, weight, y);
  const Data::primitive_desc data(engine, x, weight, y, forward);
  const Weights::primitive_desc weights(engine, x, gradient, y, forward);
#else
  const Forward::primitive_desc forward({dnnl::prop_kind::forward_training, x, weight, y}, engine);
  const Data::primitive_desc data({x, weight, y}, engine, forward);
  const Weights::primitive_desc weights({x, gradient, y}, engine, forward);
#endif
  return {bound<Forward>(
              forward,
              {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, forward.weights_desc()}, {DNNL_ARG_DST, y}}),
          bound<Data>(data, {{DNNL_ARG_DIFF_DST, y},
                             {DNNL_ARG_WEIGHTS, data.weights_desc()},
                             {DNNL_ARG_DIFF_SRC, x}}),
          bound<Weights>(weights, {{DNNL_ARG_SRC, x},
                                   {DNNL_ARG_DIFF_DST, y},
                                   {DNNL_ARG_DIFF_WEIGHTS, weights.diff_weights_desc()}})};
}

Product faster(const Product& first, const Product& second) {
  double best[2] = {1e9, 1e9};
  for (int round = 0; round < 4; ++round) {
    best[0] = std::min(best[0], seconds_of(first));
    best[1] = std::min(best[1], seconds_of(second));
  }
  return best[0] < best[1] ? first : second;
}

struct Step {
  std::vector<Product> linear, attention;
  double flops = 0;
};

void add_linear(Step& step, memory::dim rows, memory::dim outputs, memory::dim inputs,
                memory::data_type type) {
  const memory::desc x({rows, inputs}, type, memory::dims{inputs, 1});
  const memory::desc y({rows, outputs}, type, memory::dims{outputs, 1});
  const memory::desc y_transposed({outputs, rows}, type, memory::dims{1, outputs});
  const memory::desc weight({outputs, inputs}, type, memory::dims{inputs, 1});
  const memory::desc weight_transposed({inputs, outputs}, type, memory::dims{1, inputs});
  const memory::desc gradient({outputs, inputs}, memory::data_type::f32, memory::dims{inputs, 1});
  const InnerProducts inner = inner_products(rows, outputs, inputs, type);
  step.linear.push_back(faster(matmul(x, weight_transposed, y), inner.forward));
  step.linear.push_back(faster(matmul(y, weight, x), inner.backward_data));
  step.linear.push_back(faster(matmul(y_transposed, x, gradient), inner.backward_weights));
  step.flops += 6.0 * static_cast<double>(rows * outputs * inputs);
}

/// Forward q k^T and p v, backward the four of the gradients and q k^T once more (nobody keeps the
/// scores).
void add_attention(Step& step, memory::dim units, memory::dim length, memory::dim size,
                   memory::data_type type) {
  const memory::dim ll = length * length, ls = length * size;
  const memory::desc rows({units, length, size}, type, memory::dims{ls, size, 1});
  const memory::desc rows_transposed({units, size, length}, type, memory::dims{ls, 1, size});
  const memory::desc scores({units, length, length}, type, memory::dims{ll, length, 1});
  const memory::desc scores_transposed({units, length, length}, type, memory::dims{ll, 1, length});
  for (int repeat = 0; repeat < 3; ++repeat)
    step.attention.push_back(matmul(rows, rows_transposed, scores));
  for (int repeat = 0; repeat < 2; ++repeat) step.attention.push_back(matmul(scores, rows, rows));
  for (int repeat = 0; repeat < 2; ++repeat)
    step.attention.push_back(matmul(scores_transposed, rows, rows));
  step.flops += 14.0 * static_cast<double>(units * ll * size);
}

double total_seconds(const std::vector<Product>& products, int layers) {
  return seconds_of([&] {
    for (int layer = 0; layer < layers; ++layer) {
      for (const Product& product : products) product();
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string dtype = argc > 1 ? argv[1] : "f32";
  const auto size = [&](int index, int fallback) {
    return argc > index ? std::stoi(argv[index]) : fallback;
  };
  const int layers = size(2, 6), hidden = size(3, 384), heads = size(4, 12),
            feed_forward = size(5, 1536);
  const int batch = size(6, 32), length = size(7, 128);
  const memory::data_type type = dtype == "bf16" ? memory::data_type::bf16 : memory::data_type::f32;

  Step step;
  add_linear(step, batch * length, 3 * hidden, hidden, type);
  add_linear(step, batch * length, hidden, hidden, type);
  add_linear(step, batch * length, feed_forward, hidden, type);
  add_linear(step, batch * length, hidden, feed_forward, type);
  add_attention(step, batch * heads, length, hidden / heads, type);
  std::cout << "{\"ready\": true}" << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    const double linear = total_seconds(step.linear, layers);
    const double attention = total_seconds(step.attention, layers);
    std::cout << "{\"seconds\": " << linear + attention << ", \"linear_seconds\": " << linear
              << ", \"flops\": " << layers * step.flops << "}" << std::endl;
  }
}
