"""The kernels' side of the house: one module per backend, all with the same two functions.

``autograd`` calls a backend through this contract and nothing else::

    norm_forward(x, weight, bias, n, groups, eps, rms, need_stats) -> (y, stats)
    norm_backward(dy, x, stats, weight, n, groups, rms, param_dtype, need_dx, need_dw, need_db)
        -> (dx, dw, db)
    unavailable(device_type) -> None, or the reason this backend cannot serve that device type here

Rows
    ``x`` (and, independently, ``dy``) is either contiguous with any shape, or 2-D with unit stride in its last
    dimension and any row stride. A row is ``n`` elements, and there are ``M = x.numel() // n`` of them; both are at
    least 1. No alignment of the data pointer may be assumed. ``functional`` and ``autograd`` establish all of this.
Groups
    ``groups`` divides M: rows ``[g * M/groups, (g+1) * M/groups)`` form group g. ``weight`` and ``bias`` are
    contiguous and hold either ``n`` elements, shared by all groups, or ``groups * n``, one set per group. ``dw`` and
    ``db`` are always ``(groups, n)``. A plain call has one group; vmap folds its batch into groups.
Types
    ``x`` is fp64, fp32, bf16 or fp16. ``weight`` and ``bias`` have x's dtype or, for bf16 and fp16 x, fp32; both have
    the same dtype. Arithmetic is fp32, or fp64 for fp64 x. ``param_dtype`` is the dtype of dw and db.
Results
    ``y`` and ``dx`` are fresh and contiguous, with the shape and dtype of x. ``stats`` is fp32 (fp64 for fp64 x):
    ``(2, M)`` holding ``rstd`` then ``mean``, or ``(1, M)`` holding ``rstd`` alone for ``rms=True``; ``(0, M)`` if
    ``need_stats`` is false. A gradient that is not needed may come back as anything and is ignored.
Mathematics, per row (docs/math.md has the derivations)
    First pass: m = x0 + sum(x - x0)/n with x0 the row's first element, so that a constant row has its exact mean.
    Second pass: off = sum(x - m)/n, which gives back the digits lost where x0 lies far from the rest;
    mean = m + off, var = sum((x - m)^2)/n - off^2. For ``rms`` there is no mean, and var = sum(x^2)/n.
    rstd = 1/sqrt(var + eps). Never E[x^2] - E[x]^2 of x itself.
    xhat = (x - mean)*rstd; y = xhat*w + b, rounded once.
    g = dy*w; dx = rstd*(g - mean_n(g) - xhat*mean_n(g*xhat)), without the ``mean_n(g)`` term for ``rms``.
    dw = sum over the group's rows of dy*xhat, db = sum of dy.
Order
    The order of every reduction depends on n alone (for dw and db on M, groups and n), never on the number of threads
    or multiprocessors, nor on the alignment or strides of the data. No atomics.
"""
