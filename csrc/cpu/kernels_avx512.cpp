#include "norm_forward.h"
#include "ticks_backward.h"
#include "ticks_forward.h"

const fused_norm::Kernels fused_norm::kernels_avx512 = {"avx512", norm_forward, &backward_avx512, ticks_forward, ticks_backward, widen};
