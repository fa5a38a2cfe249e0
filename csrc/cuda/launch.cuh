// Which device the runtime means, and launches in clusters and with more shared memory than a kernel has unasked. Host code, for nvcc alone.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

namespace fused_norm {

inline const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Makes `device` the calling thread's current one. This library has the CUDA runtime linked in, torch another copy, and both must mean the same
// device; the caller's guard has set it and restores it. So there is mostly nothing to do, and that matters: cudaSetDevice would put the device's
// primary context in the place of whatever context is current, a green one say.
inline cudaError_t use_device(int device) {
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  return error != cudaSuccess || current == device ? error : cudaSetDevice(device);
}

struct Device {
  cudaError_t error;       // what reading the others met
  int compute_capability;  // 90 for sm_90
  size_t shared_limit;     // the most shared memory that a block may have
};

// All devices are read once: the kernel of a small call takes no longer than a few such questions.
inline const Device& device_of(int device) {
  static const std::vector<Device> devices = [] {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    std::vector<Device> found(error == cudaSuccess ? count : 0);
    for (int d = 0; d < static_cast<int>(found.size()); ++d) {
      int major = 0, minor = 0, shared = 0;
      cudaError_t failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d);
      if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d);
      if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, d);
      found[d] = {failed, 10 * major + minor, static_cast<size_t>(shared)};
    }
    return found;
  }();
  static const Device none{cudaErrorInvalidDevice, 0, 0};
  return device >= 0 && static_cast<size_t>(device) < devices.size() ? devices[device] : none;
}

// A launch on the calling thread's current device, which is `device`.
class Launch {
 public:
  Launch(int device, dim3 grid, dim3 block, int cluster, size_t shared_bytes, cudaStream_t stream) : device_(device) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1;
  }
  Launch(const Launch&) = delete;

  // Whether the device has room for one such cluster. What it says of a kernel never changes.
  template <typename... Parameters>
  bool holds(void (*kernel)(Parameters...)) const {
    const auto function = reinterpret_cast<const void*>(kernel);
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, unsigned, unsigned, size_t>, bool> known;
    const std::lock_guard<std::mutex> guard(mutex);
    const auto key = std::make_tuple(device_, function, cluster(), config_.blockDim.x * config_.blockDim.y, config_.dynamicSmemBytes);
    const auto [found, is_new] = known.try_emplace(key, false);
    if (is_new) {
      // A kernel that the driver has made of PTX for an older device has no code for clusters in it.
      cudaFuncAttributes code{};
      int clusters = 0;
      found->second = cudaFuncGetAttributes(&code, function) == cudaSuccess && code.ptxVersion >= 90 && allow(function) == cudaSuccess &&
                      cudaOccupancyMaxActiveClusters(&clusters, function, &config_) == cudaSuccess && clusters > 0;
      cudaGetLastError();  // a refusal is an answer, and no error of the launch to come
    }
    return found->second;
  }

  template <typename... Parameters, typename... Arguments>
  const char* operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
    if (const char* error = describe(allow(reinterpret_cast<const void*>(kernel)))) return error;
    return describe(cudaLaunchKernelEx(&config_, kernel, static_cast<Parameters>(arguments)...));
  }

 private:
  // Every kernel may have this much shared memory, and every cluster so many blocks.
  static constexpr size_t kSharedForAll = 48 * 1024;
  static constexpr unsigned kClusterForAll = 8;

  unsigned cluster() const { return config_.numAttrs == 0 ? 1 : attribute_.val.clusterDim.x; }

  // Asks for what this launch wants and a kernel has not unasked. A refusal of wide clusters must not cost a kernel its shared memory: the
  // driver may refuse them to code that it has made of PTX for an older device.
  cudaError_t allow(const void* function) const {
    cudaError_t error = cudaSuccess;
    if (config_.dynamicSmemBytes > kSharedForAll) {
      error = allow(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device_of(device_).shared_limit));
    }
    if (error == cudaSuccess && cluster() > kClusterForAll) error = allow(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error;
  }

  // Once for each kernel and device.
  cudaError_t allow(const void* function, cudaFuncAttribute attribute, int value) const {
    static std::mutex mutex;
    static std::set<std::tuple<int, const void*, cudaFuncAttribute>> allowed;
    const std::lock_guard<std::mutex> guard(mutex);
    if (allowed.count({device_, function, attribute}) != 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(function, attribute, value);
    if (error == cudaSuccess) allowed.insert({device_, function, attribute});
    return error;
  }

  int device_;
  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_{};
};

}  // namespace fused_norm
