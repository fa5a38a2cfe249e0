#include "add.h"
#include "norm_backward.h"
#include "norm_double_backward.h"
#include "norm_forward.h"
#include "ticks_backward.h"
#include "ticks_forward.h"

const fused_norm::Kernels fused_norm::kernels_avx2 = {
    "avx2", norm_forward, norm_backward, norm_double_backward, reduce_partials, ticks_forward, ticks_backward, widen,
};
