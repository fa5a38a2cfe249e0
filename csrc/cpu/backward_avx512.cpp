#include "norm_double_backward.h"

const fused_norm::BackwardKernels fused_norm::backward_avx512 = {norm_backward, norm_double_backward, reduce_partials};
