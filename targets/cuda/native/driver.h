// The few functions of the CUDA driver API that launching takes, found at run time: the library has
// to load, and its ops to register, on a machine without a GPU. The declarations follow the driver's
// stable binary interface, so that building needs no CUDA toolkit either.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qcompile {

using CudaResult = int;
using CudaDevice = int;
using CudaContext = void*;
using CudaModule = void*;
using CudaFunction = void*;
using CudaStream = void*;

struct alignas(64) TensorMap {
  std::uint64_t opaque[16];
};

struct Driver {
  CudaResult (*current_context)(CudaContext*);
  CudaResult (*context_device)(CudaDevice*);
  CudaResult (*device_attribute)(int*, int attribute, CudaDevice);
  CudaResult (*load_module)(CudaModule*, const void* image);
  CudaResult (*find_function)(CudaFunction*, CudaModule, const char* name);
  CudaResult (*set_attribute)(CudaFunction, int attribute, int value);
  CudaResult (*launch)(CudaFunction, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                       CudaStream, void** arguments, void** extra);
  CudaResult (*error_text)(CudaResult, const char**);
  // Null on drivers older than CUDA 12, where no GPU needs it either.
  CudaResult (*encode_tensor_map)(TensorMap*, int type, std::uint32_t rank, void* address,
                                  const std::uint64_t* sizes, const std::uint64_t* strides,
                                  const std::uint32_t* box, const std::uint32_t* element_strides,
                                  int interleave, int swizzle, int promotion, int fill);
};

// The driver, opened once. Throws std::runtime_error where there is none.
const Driver& driver();

// Throws std::runtime_error that says what failed and why.
void check(CudaResult result, const char* what);

}  // namespace qcompile
