// Whether this library's kernels can run on a device. Needs no CUDA header, as norm.h.
#pragma once

#include <string>

namespace fused_norm {

// Empty, or the reason why not; asked again, it says the same. Makes the CUDA context of the device; the current device stays what it was.
std::string cuda_unavailable(int device);

}  // namespace fused_norm
