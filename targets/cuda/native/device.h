// The kernels of the GPU at hand: loaded once for each CUDA context.
#pragma once

#include <cstdint>
#include <vector>

#include "driver.h"
#include "images.h"

namespace qcompile {

struct Kernel {
  const Image* image;
  CudaFunction function;
};

struct Device {
  int multiprocessors;
  bool fp8;  // whether there are kernels for e4m3
  std::vector<Kernel> kernels;

  // The kernel over rows that holds `columns` columns of an ONNX element type. Throws where a row
  // is too wide.
  const Kernel& over_rows(Family family, int type, std::int64_t columns) const;

  // The GEMM whose tile is expected to be fastest. Kernels that write float32 are few.
  const Kernel& gemm(std::int64_t m, std::int64_t n, std::int64_t k, bool fp8, bool float32) const;
};

// Of the calling thread's current context. Loads every kernel that its GPU can run, the first time:
// nothing is loaded later, when a graph may be under capture. Throws where there is no context, or
// no kernel for its GPU.
const Device& device();

}  // namespace qcompile
