#include "device.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace qcompile {
namespace {

constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kMajor = 75;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kMinor = 76;
constexpr int kDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kSharedByDefault = 48 * 1024;

std::string version(int architecture) {
  return std::to_string(architecture / 10) + "." + std::to_string(architecture % 10);
}

// What the library carries that this GPU runs: of its own major number, and none newer than it.
// Code for 9.0 uses instructions that only 9.0 has.
int architecture_for(int capability) {
  int best = 0;
  std::set<int> carried;
  for (int i = 0; i < kImageCount; ++i) {
    const int architecture = kImages[i].architecture;
    carried.insert(architecture);
    const bool runs = architecture == 90 ? capability == 90
                                         : architecture / 10 == capability / 10 &&
                                               architecture <= capability;
    if (runs) {
      best = std::max(best, architecture);
    }
  }
  if (best == 0) {
    std::string known;
    for (const int architecture : carried) {
      known += (known.empty() ? "" : ", ") + version(architecture);
    }
    throw std::runtime_error("qcompile has no CUDA kernels for compute capability " +
                             version(capability) + ", only for " + known);
  }
  return best;
}

std::unique_ptr<Device> load() {
  const Driver& cuda = driver();
  CudaDevice at = 0;
  int major = 0;
  int minor = 0;
  auto loaded = std::make_unique<Device>();
  check(cuda.context_device(&at), "finding the GPU of the CUDA context");
  check(cuda.device_attribute(&loaded->multiprocessors, kMultiprocessors, at), "reading the GPU");
  check(cuda.device_attribute(&major, kMajor, at), "reading the GPU's compute capability");
  check(cuda.device_attribute(&minor, kMinor, at), "reading the GPU's compute capability");
  const int architecture = architecture_for(10 * major + minor);
  for (int i = 0; i < kImageCount; ++i) {
    const Image& image = kImages[i];
    if (image.architecture != architecture) {
      continue;
    }
    CudaModule module = nullptr;
    CudaFunction function = nullptr;
    check(cuda.load_module(&module, image.code), "loading a CUDA kernel");
    check(cuda.find_function(&function, module, image.entry), "finding a CUDA kernel");
    if (image.shared_bytes > kSharedByDefault) {
      check(cuda.set_attribute(function, kDynamicShared, static_cast<int>(image.shared_bytes)),
            "giving a CUDA kernel its shared memory");
    }
    loaded->kernels.push_back({&image, function});
    loaded->fp8 = loaded->fp8 || image.fp8;
  }
  return loaded;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

float cost(const Image& image, int multiprocessors, std::int64_t m, std::int64_t n,
           std::int64_t k) {
  const std::int64_t tiles = ceil_div(m, image.rows) * ceil_div(n, image.columns);
  const auto waves = static_cast<float>(ceil_div(tiles, multiprocessors));
  return image.cost.base + image.cost.wave * waves +
         image.cost.wave_depth * waves * static_cast<float>(k) * 1e-3F +
         image.cost.weights * static_cast<float>(n) * static_cast<float>(k) * 1e-6F +
         image.cost.results * static_cast<float>(m) * static_cast<float>(n) * 1e-6F;
}

}  // namespace

const Kernel& Device::over_rows(Family family, int type, std::int64_t columns) const {
  const Kernel* best = nullptr;
  int widest = 0;
  for (const Kernel& kernel : kernels) {
    const Image& image = *kernel.image;
    if (image.family != family || image.type != type) {
      continue;
    }
    widest = std::max(widest, image.block);
    if (image.block >= columns && (best == nullptr || image.block < best->image->block)) {
      best = &kernel;
    }
  }
  if (best == nullptr) {
    throw std::runtime_error("rows of " + std::to_string(columns) + " columns, at most " +
                             std::to_string(widest) + " can be");
  }
  return *best;
}

const Kernel& Device::gemm(std::int64_t m, std::int64_t n, std::int64_t k, bool wants_fp8,
                           bool float32) const {
  const Kernel* best = nullptr;
  float least = std::numeric_limits<float>::infinity();
  for (const Kernel& kernel : kernels) {
    const Image& image = *kernel.image;
    const bool fits = image.family == Family::kGemm ||
                      (image.family == Family::kGemmHopper && !float32);
    if (!fits || image.fp8 != wants_fp8 || m < image.fewest_rows || m > image.most_rows) {
      continue;
    }
    const float expected = cost(image, multiprocessors, m, n, k);
    if (expected < least) {
      least = expected;
      best = &kernel;
    }
  }
  if (best == nullptr) {
    throw std::runtime_error("no tile for a GEMM of " + std::to_string(m) + " rows");
  }
  return *best;
}

const Device& device() {
  static std::mutex guard;
  static std::unordered_map<CudaContext, std::unique_ptr<Device>> devices;
  thread_local CudaContext last_context = nullptr;
  thread_local const Device* last = nullptr;

  CudaContext context = nullptr;
  check(driver().current_context(&context), "finding the CUDA context");
  if (context == nullptr) {
    throw std::runtime_error("this thread has no CUDA context");
  }
  if (context != last_context) {
    const std::lock_guard<std::mutex> hold(guard);
    std::unique_ptr<Device>& entry = devices[context];
    if (entry == nullptr) {
      entry = load();
    }
    last = entry.get();
    last_context = context;
  }
  return *last;
}

}  // namespace qcompile
