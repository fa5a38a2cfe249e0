"""The kernels' side of the house: one module per backend, all with the same functions, for norms and for ticks.

``autograd`` calls a backend through this contract and nothing else.

Norms
=====

::

    norm_forward(x, weight, bias, n, groups, eps, rms, need_stats, cast=False) -> (y, stats)
    norm_backward(dy, x, stats, weight, n, groups, rms, param_dtype, need_dx, need_dw, need_db)
        -> (dx, dw, db)
    norm_double_backward(ddx, ddw, ddb, dy, x, stats, weight, n, groups, rms, param_dtype,
                         need_ddy, need_dx, need_dw) -> (grad_dy, grad_x, grad_w)
    add_norm_forward(x, residual, weight, bias, seed, n, eps, rms, dropout_p, need_stats, cast)
        -> (y, summed, stats)
    add_norm_backward(dy, dsummed, summed, stats, weight, seed, n, rms, dropout_p, param_dtype, x_dtype,
                      need_dx, need_dresidual, need_dw, need_db) -> (dx, dresidual, dw, db)
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
    xhat = (x - mean)*rstd; y = xhat*w + b, rounded once. With ``cast``, xhat is rounded to x's dtype before all that
    follows, as Llama does; it changes y alone, and no derivative.
    g = dy*w; dx = rstd*(g - mean_n(g) - xhat*mean_n(g*xhat)), without the ``mean_n(g)`` term for ``rms``.
    dw = sum over the group's rows of dy*xhat, db = sum of dy.
    Double backward: u = ddx, v = ddw, c = ddb, a = mean_n(u*xhat), b = mean_n(g*xhat), p = u - mean_n(u) - xhat*a.
    grad_dy = w*rstd*p + v*xhat + c; grad_w = sum over the group's rows of dy*rstd*p.
    t = v*dy - rstd*(b*u + a*g); grad_x = rstd*(t - mean_n(t) - xhat*(mean_n(t*xhat) + rstd*mean_n(p*g))),
    again without the plain means for ``rms``.
Add and norm
    summed = x*keep/(1 - dropout_p) + residual, rounded once to residual's dtype; y and stats are norm_forward's of
    *that*, of one group. ``residual`` is rows as x is, as many, in another shape perhaps; y and summed have its dtype,
    fresh and contiguous. ``x`` has its dtype, or is bf16 or fp16 beside fp32 residual. ``dropout_p`` is in [0, 1), and
    ``seed`` None exactly where it is 0; else int64, one element, on x's device, where the kernel reads it.
    keep of element i, counted over the logical (M, n) rows, is ``r_i >= min(floor(dropout_p*2^32 + 0.5), 2^32 - 1)``,
    r_i the word ``i % 4`` of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with
    the key (low, high half of seed) and the counter (low, high half of i // 4, 0, 0): the same mask on every backend.
    It multiplies: a dropped NaN is NaN, as torch's is.
    Backward: ``dy`` and ``dsummed`` (None: zeros) reach y and summed, rows as x is, in summed's dtype.
    d = norm_backward's dx of (dy, summed) + dsummed; dresidual = d; dx = d*keep/(1 - dropout_p), each rounded once, dx
    to ``x_dtype``. Where dropout_p is 0 and x_dtype is summed's they would be one: then dx comes back as anything, and
    the caller takes dresidual, which the backend gives if need_dx or need_dresidual.
Order
    The order of every reduction depends on n alone (for dw and db on M, groups and n), never on the number of threads
    or multiprocessors, nor on the alignment or strides of the data. No atomics.

Ticks
=====

::

    ticks_forward(z, target, weight, ignore_index, smoothing, ce, ticks, softcap) -> (loss, stats)
    ticks_backward(grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks, softcap,
                   need_dz, need_dtarget, inplace) -> (dz, dtarget)

Arguments
    ``z`` is the logits, (M, V), contiguous or 2-D with unit stride in its last dimension and any row stride; fp64,
    fp32, bf16 or fp16. M and V are at least 1. ``target`` is int64 (M,), contiguous (class indices, "hard"), or
    floating (M, V) with rows as z's (class probabilities, "soft"), in z's dtype or in fp32 beside bf16 and fp16 z.
    ``weight`` is None or (V,), contiguous, in z's dtype or in fp32 beside bf16 and fp16. ``smoothing`` is in [0, 1],
    ``ce`` and ``ticks`` weigh cross entropy and ticks, ``softcap`` is s > 0, or 0.0 for none; all four Python floats.
    ``ignore_index`` is for hard targets. Arithmetic is fp32, or fp64 for fp64 z; acc is that dtype below.
    ``grad`` is the gradient of loss, (M,) in acc, ``grad_lse`` None or that of each row's lse, likewise; either of any
    stride, 0 (expanded) included.
Results
    ``loss`` is (M,) in acc. ``stats`` is acc, contiguous: (3, M) holding largest, others, q_t for hard targets without
    smoothing; (4, M) holding largest, others, A, B for all else. A row whose target is ``ignore_index`` has loss 0 and
    stats 0, is not read, and has gradients that are exactly 0, whatever it holds. A target out of range gives that row
    a NaN loss, and nothing is read or written out of bounds (the native CPU backend raises IndexError instead).
    ``dz`` has z's dtype and shape, fresh and contiguous; or with ``inplace`` it is z itself, written over. ``dtarget``
    (soft targets alone) has target's dtype and shape, fresh and contiguous. A gradient that is not needed may come back
    as anything and is ignored.
Mathematics, per row (docs/math.md has the derivations)
    z'_j = s*tanh(z_j/s) with a softcap, else z_j; everything else is of z'.
    largest = max_j z'_j; others = sum of exp(z'_j - largest) over all j but one that is largest, plus
    (largest - largest), which makes a row that holds an infinity NaN, as torch's is, and adds 0 to any other;
    total = 1 + others; p_j = exp(z'_j - largest)/total; nll_j = log1p(others) + (largest - z'_j);
    q_j = 1 - p_j, and others/total where z'_j == largest: so q, nll and lse = largest + log1p(others) keep their
    relative accuracy however near a p is to 1, and no difference of large numbers is rounded.
    a_j = w_j*((1 - smoothing)*[j == t] + smoothing/V) for hard targets, w_j*((1 - smoothing)*target_j + smoothing/V)
    for soft ones. A term whose a_j is 0 counts for nothing, also where z_j is -inf.
    A = sum_j a_j; B = sum_j a_j*q_j.
    loss = sum_j a_j*((ce + ticks)*nll_j + ticks*p_j): inf where a masked class (z_j = -inf) has mass, also for ce = 0.
    dz'_k = grad*(p_k*(ce*(A - a_k) + ticks*(B - a_k*q_k)) - a_k*q_k*(ce + ticks*q_k)) + grad_lse*p_k;
    without smoothing and soft targets that is alpha*p_k, and -alpha*q_t at the target, with
    alpha = grad*w_t*(ce + ticks*q_t). dz_k = dz'_k*(1 - tanh(z_k/s)^2).
    dtarget_j = grad*(1 - smoothing)*w_j*((ce + ticks)*nll_j + ticks*p_j).
Order
    As for norms: the order of a row's sums depends on V alone.
"""
