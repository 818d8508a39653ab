#include "launch.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "device.h"

namespace qcompile {
namespace {

constexpr int kFloat16 = 10;  // ONNX element types
constexpr int kBfloat16 = 16;
constexpr int kMultiple = 16;  // of columns and addresses: what 16-byte loads ask for
constexpr std::int32_t kGroup = 8;  // rows of tiles that share columns of the weight in L2

void require(bool holds, const std::string& otherwise) {
  if (!holds) {
    throw std::runtime_error(otherwise);
  }
}

void require_aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    require(reinterpret_cast<std::uintptr_t>(pointer) % kMultiple == 0,
            "a tensor does not start at a multiple of 16 bytes");
  }
}

void require_fp8(const Device& here, bool wanted) {
  require(!wanted || here.fp8, "this GPU has no FP8: compute capability 8.9 or 9.0 has");
}

void run(const Kernel& kernel, std::int64_t blocks, CudaStream stream, void** arguments) {
  require(blocks <= std::numeric_limits<std::int32_t>::max(), "too many rows for one launch");
  check(driver().launch(kernel.function, static_cast<unsigned>(blocks), 1, 1,
                        kernel.image->threads, 1, 1, kernel.image->shared_bytes, stream, arguments,
                        nullptr),
        "launching a CUDA kernel");
}

// A tensor map as a kernel takes it: the map, then sizes and strides that the compiler may use.
struct MapArgument {
  TensorMap map;
  std::int32_t sizes[2];
  std::int64_t strides[2];

  MapArgument(const void* address, std::int64_t rows, std::int64_t columns, int bytes, Box box)
      : sizes{static_cast<std::int32_t>(rows), static_cast<std::int32_t>(columns)},
        strides{columns, 1} {
    const std::uint64_t extent[2] = {static_cast<std::uint64_t>(columns),
                                     static_cast<std::uint64_t>(rows)};
    const std::uint64_t stride[1] = {static_cast<std::uint64_t>(columns * bytes)};
    const std::uint32_t inner_outer[2] = {box.columns, box.rows};
    const std::uint32_t element_strides[2] = {1, 1};
    const std::uint32_t width = box.columns * static_cast<std::uint32_t>(bytes);
    const int swizzle = width == 128 ? 3 : width == 64 ? 2 : 1;  // 128, 64 or 32 bytes
    const int type = bytes == 1 ? 0 : 1;                         // UINT8 or UINT16
    require(driver().encode_tensor_map != nullptr, "the CUDA driver is older than CUDA 12");
    check(driver().encode_tensor_map(&map, type, 2, const_cast<void*>(address), extent, stride,
                                     inner_outer, element_strides, 0, swizzle, 2, 0),
          "describing a tensor to the GPU");
  }
};

}  // namespace

void launch(const ActivationRows& work, CudaStream stream) {
  if (work.rows == 0) {
    return;
  }
  require(work.columns % kMultiple == 0 && work.x_stride % kMultiple == 0,
          "rows of " + std::to_string(work.columns) + " columns, no multiple of 16");
  require_aligned({work.x, work.up, work.codes});
  const Device& here = device();
  require_fp8(here, work.fp8);
  const Kernel& kernel = here.over_rows(Family::kActivationRows, work.type, work.columns);
  auto columns = static_cast<std::int32_t>(work.columns);
  std::int64_t x_stride = work.x_stride;
  std::int64_t up_stride = work.up_stride;
  auto kind = static_cast<std::int32_t>(work.kind);
  std::int32_t has_up = work.up != nullptr;
  std::int32_t is_static = work.static_scale != nullptr;
  std::int32_t is_fp8 = work.fp8;
  const void* x = work.x;
  const void* up = work.up;
  const void* static_scale = work.static_scale;
  void* codes = work.codes;
  void* scale = work.scale;
  void* scratch = nullptr;
  void* arguments[] = {&x,         &up,   &static_scale, &codes,     &scale,  &columns, &x_stride,
                       &up_stride, &kind, &has_up,       &is_static, &is_fp8, &scratch, &scratch};
  run(kernel, work.rows, stream, arguments);
}

void launch(const NormRows& work, CudaStream stream) {
  if (work.rows == 0) {
    return;
  }
  require(work.columns % kMultiple == 0,
          "rows of " + std::to_string(work.columns) + " columns, no multiple of 16");
  require_aligned({work.x, work.residual, work.weight, work.bias, work.codes, work.sum});
  const Device& here = device();
  require_fp8(here, work.fp8);
  const Kernel& kernel = here.over_rows(Family::kNormRows, work.type, work.columns);
  auto columns = static_cast<std::int32_t>(work.columns);
  float epsilon = work.epsilon;
  std::int32_t is_rms = work.rms;
  std::int32_t has_residual = work.residual != nullptr;
  std::int32_t has_bias = work.bias != nullptr;
  std::int32_t has_sum = work.sum != nullptr;
  std::int32_t is_static = work.static_scale != nullptr;
  std::int32_t is_fp8 = work.fp8;
  const void* x = work.x;
  const void* residual = work.residual;
  const void* weight = work.weight;
  const void* bias = work.bias;
  const void* static_scale = work.static_scale;
  void* codes = work.codes;
  void* scale = work.scale;
  void* sum = work.sum;
  void* scratch = nullptr;
  void* arguments[] = {&x,        &residual, &weight,    &bias,    &static_scale, &codes,
                       &scale,    &sum,      &columns,   &epsilon, &is_rms,       &has_residual,
                       &has_bias, &has_sum,  &is_static, &is_fp8,  &scratch,      &scratch};
  run(kernel, work.rows, stream, arguments);
}

void launch(const Gemm& work, CudaStream stream) {
  if (work.m == 0) {
    return;
  }
  constexpr auto kLimit = std::numeric_limits<std::int32_t>::max();
  require(work.m <= kLimit && work.n <= kLimit && work.k <= kLimit, "a GEMM that is too large");
  require(work.n % 16 == 0, "a weight of " + std::to_string(work.n) +
                                " output channels, no multiple of 16");
  require(work.k % 32 == 0,
          "a weight of " + std::to_string(work.k) + " input channels, no multiple of 32");
  require_aligned({work.a, work.b, work.out, work.b_scale, work.bias});
  const bool float32 = work.type != kFloat16 && work.type != kBfloat16;
  const Device& here = device();
  require_fp8(here, work.fp8);
  const Kernel& kernel = here.gemm(work.m, work.n, work.k, work.fp8, float32);
  const Image& image = *kernel.image;
  const std::int64_t tiles = ((work.m + image.rows - 1) / image.rows) *
                             ((work.n + image.columns - 1) / image.columns);
  auto m = static_cast<std::int32_t>(work.m);
  auto n = static_cast<std::int32_t>(work.n);
  auto k = static_cast<std::int32_t>(work.k);
  std::int32_t stride = work.scale_per_row ? 1 : 0;
  std::int32_t has_bias = work.bias != nullptr;
  std::int32_t out_kind = float32 ? 2 : work.type == kBfloat16 ? 1 : 0;
  std::int32_t group = kGroup;
  const void* a = work.a;
  const void* b = work.b;
  const void* a_scale = work.a_scale;
  const void* b_scale = work.b_scale;
  const void* bias = work.bias;
  void* out = work.out;
  void* scratch = nullptr;
  if (image.family == Family::kGemm) {
    void* arguments[] = {&a, &b, &out,    &a_scale,  &b_scale,  &bias,  &m,       &n,
                         &k, &stride, &has_bias, &out_kind, &group, &scratch, &scratch};
    run(kernel, tiles, stream, arguments);
    return;
  }
  MapArgument a_map(a, work.m, work.k, 1, image.boxes[0]);
  MapArgument b_map(b, work.n, work.k, 1, image.boxes[1]);
  MapArgument out_map(out, work.m, work.n, 2, image.boxes[2]);
  void* arguments[] = {
      &a_map.map,   &a_map.sizes[0],   &a_map.sizes[1],   &a_map.strides[0],   &a_map.strides[1],
      &b_map.map,   &b_map.sizes[0],   &b_map.sizes[1],   &b_map.strides[0],   &b_map.strides[1],
      &out_map.map, &out_map.sizes[0], &out_map.sizes[1], &out_map.strides[0], &out_map.strides[1],
      &a_scale,     &b_scale,          &bias,             &m,                  &n,
      &k,           &stride,           &has_bias,         &out_kind,           &group,
      &scratch,     &scratch};
  // Blocks are persistent: each takes every n-th tile.
  run(kernel, std::min<std::int64_t>(tiles, here.multiprocessors), stream, arguments);
}

}  // namespace qcompile
