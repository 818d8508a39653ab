#include "ort.h"

#include <memory>

namespace qcompile {
namespace {

const OrtApi* g_api = nullptr;

struct ReleaseInfo {
  void operator()(OrtTensorTypeAndShapeInfo* info) const {
    ort().ReleaseTensorTypeAndShapeInfo(info);
  }
};

}  // namespace

const OrtApi& ort() { return *g_api; }

void set_ort(const OrtApi* api) { g_api = api; }

void check(OrtStatus* status) {
  if (status != nullptr) {
    const std::string text = ort().GetErrorMessage(status);
    ort().ReleaseStatus(status);
    throw std::runtime_error(text);
  }
}

std::int64_t Tensor::count() const {
  std::int64_t product = 1;
  for (const std::int64_t size : shape) {
    product *= size;
  }
  return product;
}

Tensor input(const OrtKernelContext* context, std::size_t index) {
  std::size_t count = 0;
  check(ort().KernelContext_GetInputCount(context, &count));
  Tensor found;
  if (index >= count) {
    return found;
  }
  const OrtValue* value = nullptr;
  check(ort().KernelContext_GetInput(context, index, &value));
  if (value == nullptr) {
    return found;
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort().GetTensorTypeAndShape(value, &raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseInfo> info(raw);
  std::size_t rank = 0;
  check(ort().GetDimensionsCount(info.get(), &rank));
  found.shape.resize(rank);
  check(ort().GetDimensions(info.get(), found.shape.data(), rank));
  void* data = nullptr;
  check(ort().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  found.data = data;
  return found;
}

void* output(OrtKernelContext* context, std::size_t index,
             const std::vector<std::int64_t>& shape) {
  std::size_t count = 0;
  check(ort().KernelContext_GetOutputCount(context, &count));
  if (index >= count) {
    return nullptr;
  }
  OrtValue* value = nullptr;
  check(ort().KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  if (value == nullptr) {
    return nullptr;
  }
  void* data = nullptr;
  check(ort().GetTensorMutableData(value, &data));
  return data;
}

std::int64_t int_attribute(const OrtKernelInfo* info, const char* name) {
  std::int64_t value = 0;
  check(ort().KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

float float_attribute(const OrtKernelInfo* info, const char* name) {
  float value = 0;
  check(ort().KernelInfoGetAttribute_float(info, name, &value));
  return value;
}

std::string string_attribute(const OrtKernelInfo* info, const char* name) {
  std::size_t size = 0;
  check(ort().KernelInfoGetAttribute_string(info, name, nullptr, &size));
  std::string value(size, '\0');
  check(ort().KernelInfoGetAttribute_string(info, name, value.data(), &size));
  value.resize(size - 1);  // it counts the terminator
  return value;
}

}  // namespace qcompile
