#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace qcompile {
namespace {

template <typename Function>
void find(void* library, const char* name, Function*& function, bool required = true) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr && required) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }
}

Driver open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error("there is no CUDA driver (libcuda.so.1) on this machine");
  }
  Driver found{};
  find(library, "cuCtxGetCurrent", found.current_context);
  find(library, "cuCtxGetDevice", found.context_device);
  find(library, "cuDeviceGetAttribute", found.device_attribute);
  find(library, "cuModuleLoadData", found.load_module);
  find(library, "cuModuleGetFunction", found.find_function);
  find(library, "cuFuncSetAttribute", found.set_attribute);
  find(library, "cuLaunchKernel", found.launch);
  find(library, "cuGetErrorString", found.error_text);
  find(library, "cuTensorMapEncodeTiled", found.encode_tensor_map, false);
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open();
  return opened;
}

void check(CudaResult result, const char* what) {
  if (result == 0) {
    return;
  }
  const char* text = nullptr;
  driver().error_text(result, &text);
  throw std::runtime_error(std::string(what) + ": " +
                           (text != nullptr ? text : "CUDA error " + std::to_string(result)));
}

}  // namespace qcompile
