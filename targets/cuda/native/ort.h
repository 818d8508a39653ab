// ONNX Runtime's C interface, with errors as exceptions.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace qcompile {

// The oldest interface with shape inference for custom operators: any later ONNX Runtime has it.
constexpr std::uint32_t kApiVersion = 17;

// Set once, when the library is registered.
const OrtApi& ort();
void set_ort(const OrtApi* api);

void check(OrtStatus* status);

// Runs `body`; what it throws becomes a status that names the operator.
template <typename Body>
OrtStatus* guarded(const char* name, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    const std::string text = std::string("qcompile.") + name + ": " + error.what();
    return ort().CreateStatus(ORT_FAIL, text.c_str());
  }
}

// An input of a running node; `data` is null for one that is left out.
struct Tensor {
  const void* data = nullptr;
  std::vector<std::int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  std::int64_t count() const;
  std::int64_t last() const { return shape.empty() ? 1 : shape.back(); }
};

Tensor input(const OrtKernelContext* context, std::size_t index);

// Null where the node has no such output.
void* output(OrtKernelContext* context, std::size_t index, const std::vector<std::int64_t>& shape);

std::int64_t int_attribute(const OrtKernelInfo* info, const char* name);
float float_attribute(const OrtKernelInfo* info, const char* name);
std::string string_attribute(const OrtKernelInfo* info, const char* name);

}  // namespace qcompile
