// Launches: arguments in the order of the kernels' signatures (kernels.py, gemm.py).
#pragma once

#include <cstdint>

#include "driver.h"

namespace qcompile {

enum class Activation : std::int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// Pointers are to device memory; absent ones are null. `type` is ONNX's, of what is not int8 or
// float32.
struct ActivationRows {
  int type;
  bool fp8;  // codes are e4m3, not int8
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t x_stride;
  std::int64_t up_stride;
  Activation kind;
  const void* x;
  const void* up;
  const void* static_scale;
  void* codes;
  void* scale;
};

struct NormRows {
  int type;
  bool fp8;
  std::int64_t rows;
  std::int64_t columns;
  float epsilon;
  bool rms;
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  const void* static_scale;
  void* codes;
  void* scale;
  void* sum;
};

struct Gemm {
  int type;  // of the result
  bool fp8;
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  bool scale_per_row;
  const void* a;
  const void* b;
  const void* a_scale;
  const void* b_scale;
  const void* bias;
  void* out;
};

void launch(const ActivationRows& work, CudaStream stream);
void launch(const NormRows& work, CudaStream stream);
void launch(const Gemm& work, CudaStream stream);

}  // namespace qcompile
