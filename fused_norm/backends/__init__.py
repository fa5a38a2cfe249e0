"""The kernels' side of the house: one module per backend, all with the same three functions.

``autograd`` calls a backend through this contract and nothing else::

    norm_forward(x, weight, bias, n, groups, eps, rms, need_stats) -> (y, stats)
    norm_backward(dy, x, stats, weight, n, groups, rms, param_dtype, need_dx, need_dw, need_db)
        -> (dx, dw, db)
    norm_double_backward(ddx, ddw, ddb, dy, x, stats, weight, n, groups, rms, param_dtype,
                         need_ddy, need_dx, need_dw) -> (grad_dy, grad_x, grad_w)
    unavailable(device_type) -> None, or the reason this backend cannot serve that device type here

Rows
    ``x`` (and, independently, ``dy`` and ``ddx``) is either contiguous with any shape, or 2-D with unit stride in its
    last dimension and any row stride. A row is ``n`` elements, and there are ``M = x.numel() // n`` of them; both are
    at least 1. No alignment of the data pointer may be assumed. ``functional`` and ``autograd`` establish all of this.
Groups
    ``groups`` divides M: rows ``[g * M/groups, (g+1) * M/groups)`` form group g. ``weight`` and ``bias`` are
    contiguous and hold either ``n`` elements, shared by all groups, or ``groups * n``, one set per group. ``dw`` and
    ``db`` (and ``grad_w``) are always ``(groups, n)``; ``ddw`` and ``ddb`` are as weight and bias. A plain call has one
    group; vmap folds its batch into groups.
Types
    ``x`` is fp64, fp32, bf16 or fp16. ``weight`` and ``bias`` have x's dtype or, for bf16 and fp16 x, fp32; both have
    the same dtype. Arithmetic is fp32, or fp64 for fp64 x. ``param_dtype`` is the dtype of dw and db, of ddw and ddb,
    and of the weight if there is one; dy and ddx have x's dtype.
Results
    ``y`` and ``dx`` are fresh and contiguous, with the shape and dtype of x. ``stats`` is fp32 (fp64 for fp64 x):
    ``(2, M)`` holding ``rstd`` then ``mean``, or ``(1, M)`` holding ``rstd`` alone for ``rms=True``; ``(0, M)``
    or None if ``need_stats`` is false. A gradient that is not needed may come back as anything and is ignored.
Double backward
    ``ddx``, ``ddw``, ``ddb`` are the gradients that reach backward's results dx, dw, db; each may be None, for zeros.
    ``dy`` may be None if neither ``need_dx`` nor ``need_dw``. With ``need_ddy`` alone this is the forward derivative
    (jvp) in the direction ``(ddx, ddw, ddb)``: y is linear in nothing else. The results have the shapes and dtypes of
    dy, x and dw: ``grad_dy`` and ``grad_x`` fresh and contiguous.
Mathematics, per row (docs/math.md has the derivations)
    First pass: m = x0 + sum(x - x0)/n with x0 the row's first element, so that a constant row has its exact mean.
    Second pass: off = sum(x - m)/n, which gives back the digits lost where x0 lies far from the rest;
    mean = m + off, var = sum((x - m)^2)/n - off^2. For ``rms`` there is no mean, and var = sum(x^2)/n.
    rstd = 1/sqrt(var + eps). Never E[x^2] - E[x]^2 of x itself.
    xhat = (x - mean)*rstd; y = xhat*w + b, rounded once.
    g = dy*w; dx = rstd*(g - mean_n(g) - xhat*mean_n(g*xhat)), without the ``mean_n(g)`` term for ``rms``.
    dw = sum over the group's rows of dy*xhat, db = sum of dy.
    Double backward: u = ddx, v = ddw, c = ddb, a = mean_n(u*xhat), b = mean_n(g*xhat), p = u - mean_n(u) - xhat*a.
    grad_dy = w*rstd*p + v*xhat + c; grad_w = sum over the group's rows of dy*rstd*p.
    t = v*dy - rstd*(b*u + a*g); grad_x = rstd*(t - mean_n(t) - xhat*(mean_n(t*xhat) + rstd*mean_n(p*g))),
    again without the plain means for ``rms``.
Order
    The order of every reduction depends on n alone (for dw and db on M, groups and n), never on the number of threads
    or multiprocessors, nor on the alignment or strides of the data. No atomics.
"""
