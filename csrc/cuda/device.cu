// Which devices this library has code for: what it was built for is the build's choice (setup.py), and the driver's what it makes of PTX.
#include "device.h"

#include "launch.cuh"

namespace fused_norm {
namespace {

// Built for the same devices as every kernel, and the least for the driver to load.
__global__ void probe() {}

std::string ask(int device) {
  const std::string name = "cuda:" + std::to_string(device);
  int count = 0, before = 0;
  cudaError_t error = cudaGetDeviceCount(&count);  // without a driver it says so, where a device's own error would be that it is not there
  if (error == cudaSuccess) error = device_of(device).error;
  if (error == cudaSuccess) error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = use_device(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes code{};
    error = cudaFuncGetAttributes(&code, probe);
    use_device(before);
  }
  cudaGetLastError();  // it has been told, and is no error of a launch to come
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return "it has no code for sm_" + std::to_string(device_of(device).compute_capability) + ", the compute capability of " + name;
  }
  return error == cudaSuccess ? "" : "the CUDA runtime says of " + name + ": " + cudaGetErrorString(error);
}

}  // namespace

std::string cuda_unavailable(int device) {
  static std::mutex mutex;
  static std::map<int, std::string> known;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = ask(device);
}

}  // namespace fused_norm
