#include "compute.h"

#include <stdexcept>
#include <string>

#include "launch.h"

namespace qcompile {
namespace {

using Shape = std::vector<std::int64_t>;

[[noreturn]] void refuse(const std::string& why) { throw std::runtime_error(why); }

std::string text(const Shape& shape) {
  std::string joined;
  for (const std::int64_t size : shape) {
    joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  }
  return "[" + joined + "]";
}

void require_shape(const Tensor& tensor, const Shape& expected, const char* name) {
  if (tensor && tensor.shape != expected) {
    refuse(std::string(name) + " has the shape " + text(tensor.shape) + ", not " +
           text(expected));
  }
}

void require_one(const Tensor& tensor) {
  if (tensor && tensor.count() != 1) {
    refuse("a static scale has " + std::to_string(tensor.count()) + " elements, not one");
  }
}

Shape with_last(Shape shape, std::int64_t last) {
  shape.back() = last;
  return shape;
}

void require_rank(const Tensor& x) {
  if (x.shape.empty()) {
    refuse("a scalar has no rows");
  }
}

// The per-token scale; per tensor there is none to write.
void* scale_output(OrtKernelContext* context, std::size_t index, const Tensor& static_scale,
                   const Shape& shape) {
  void* scale = output(context, index, with_last(shape, 1));
  if (static_scale && scale != nullptr) {
    refuse("a static scale is given, so that there is no scale to put out");
  }
  if (!static_scale && scale == nullptr) {
    refuse("the scale must be an output where none is given");
  }
  return scale;
}

class Activate : public Node {
 public:
  Activate(int type, bool fp8, Activation kind, bool packed, bool has_up)
      : type_(type), fp8_(fp8), kind_(kind), packed_(packed), has_up_(has_up) {}

  void compute(OrtKernelContext* context, void* stream) const override {
    const Tensor x = input(context, 0);
    const Tensor up = has_up_ ? input(context, 1) : Tensor{};
    const Tensor static_scale = input(context, has_up_ ? 2 : 1);
    require_rank(x);
    require_one(static_scale);
    require_shape(up, x.shape, "up");
    if (packed_ && (up || x.last() % 2 != 0)) {
      refuse(up ? "packed, and yet there is an up" : "packed, and yet an odd number of columns");
    }
    const std::int64_t columns = packed_ ? x.last() / 2 : x.last();
    const Shape shape = with_last(x.shape, columns);
    const int bytes = 2;
    ActivationRows work{};
    work.type = type_;
    work.fp8 = fp8_;
    work.rows = columns == 0 ? 0 : x.count() / x.last();
    work.columns = columns;
    work.x_stride = x.last();
    work.up_stride = x.last();
    work.kind = kind_;
    work.x = x.data;
    work.up = packed_ ? static_cast<const char*>(x.data) + columns * bytes : up.data;
    work.static_scale = static_scale.data;
    work.codes = output(context, 0, shape);
    work.scale = scale_output(context, 1, static_scale, shape);
    launch(work, stream);
  }

 private:
  int type_;
  bool fp8_;
  Activation kind_;
  bool packed_;
  bool has_up_;
};

class Normalize : public Node {
 public:
  Normalize(int type, bool fp8, bool rms, float epsilon)
      : type_(type), fp8_(fp8), rms_(rms), epsilon_(epsilon) {}

  void compute(OrtKernelContext* context, void* stream) const override {
    const std::size_t shift = rms_ ? 0 : 1;  // RMSNorm has no bias
    const Tensor x = input(context, 0);
    const Tensor weight = input(context, 1);
    const Tensor bias = rms_ ? Tensor{} : input(context, 2);
    const Tensor residual = input(context, 2 + shift);
    const Tensor static_scale = input(context, 3 + shift);
    require_rank(x);
    require_one(static_scale);
    require_shape(weight, {x.last()}, "weight");
    require_shape(bias, {x.last()}, "bias");
    require_shape(residual, x.shape, "residual");
    NormRows work{};
    work.type = type_;
    work.fp8 = fp8_;
    work.rows = x.last() == 0 ? 0 : x.count() / x.last();
    work.columns = x.last();
    work.epsilon = epsilon_;
    work.rms = rms_;
    work.x = x.data;
    work.residual = residual.data;
    work.weight = weight.data;
    work.bias = bias.data;
    work.static_scale = static_scale.data;
    work.codes = output(context, 0, x.shape);
    work.scale = scale_output(context, 1, static_scale, x.shape);
    work.sum = output(context, 2, x.shape);
    launch(work, stream);
  }

 private:
  int type_;
  bool fp8_;
  bool rms_;
  float epsilon_;
};

class Multiply : public Node {
 public:
  Multiply(int type, bool fp8) : type_(type), fp8_(fp8) {}

  void compute(OrtKernelContext* context, void* stream) const override {
    const Tensor x = input(context, 0);
    const Tensor x_scale = input(context, 1);
    const Tensor weight = input(context, 2);
    const Tensor weight_scale = input(context, 3);
    const Tensor bias = input(context, 4);
    require_rank(x);
    if (weight.shape.size() != 2) {
      refuse("weight has the shape " + text(weight.shape) + ", not [N, K]");
    }
    const std::int64_t n = weight.shape[0];
    require_shape(weight, {n, x.last()}, "weight");
    require_shape(weight_scale, {n}, "weight_scale");
    require_shape(bias, {n}, "bias");
    Gemm work{};
    work.type = type_;
    work.fp8 = fp8_;
    work.m = x.last() == 0 ? 0 : x.count() / x.last();
    work.n = n;
    work.k = x.last();
    if (x_scale.count() != 1) {
      require_shape(x_scale, with_last(x.shape, 1), "x_scale");
    }
    work.scale_per_row = x_scale.count() != 1;
    work.a = x.data;
    work.b = weight.data;
    work.a_scale = x_scale.data;
    work.b_scale = weight_scale.data;
    work.bias = bias.data;
    work.out = output(context, 0, with_last(x.shape, n));
    launch(work, stream);
  }

 private:
  int type_;
  bool fp8_;
};

Activation activation(const std::string& kind) {
  for (int i = 0; i < kActivationCount; ++i) {
    if (kind == kActivations[i]) {
      return static_cast<Activation>(i);
    }
  }
  refuse("no activation is called " + kind);
}

}  // namespace

std::unique_ptr<Node> make_node(const Definition& definition, int type,
                                const OrtKernelInfo* info) {
  const std::string kind = definition.kind;
  const bool fp8 = definition.fp8;
  if (kind == "Quantize") {
    return std::make_unique<Activate>(type, fp8, Activation::kNone, false, false);
  }
  if (kind == "Activation") {
    return std::make_unique<Activate>(type, fp8, activation(string_attribute(info, "kind")),
                                      int_attribute(info, "packed") != 0, true);
  }
  if (kind == "LayerNorm" || kind == "RMSNorm") {
    return std::make_unique<Normalize>(type, fp8, kind == "RMSNorm",
                                       float_attribute(info, "epsilon"));
  }
  if (kind == "MatMul") {
    return std::make_unique<Multiply>(type, fp8);
  }
  refuse("not an operator of this library");
}

}  // namespace qcompile
