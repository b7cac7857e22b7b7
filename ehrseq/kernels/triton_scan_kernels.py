"""The Triton kernels of the selective scan. Importing this module imports triton: triton_scan.py does so when called.

One program walks over the steps of one row and a block of channels, a tile of steps at a time. Inside a tile a parallel
scan runs over the steps; between tiles one state [channels, state] is carried.

    decayed state  exp(s A) h   with s the sum of the tile's step sizes so far; as h + (exp(s A) - 1) h where s A is
                                small, so that the rounding of thousands of decays near 1 does not add up; what the
                                rounding of the carried state loses is carried beside it
    no atomics     what several programs add to (B, C, A, D, delta_bias) goes to a slot for each, summed afterwards:
                   gradients are the same in every run

Glossary: t steps of a tile, d channels of a block, n states, padded to a power of two. CT is the compute dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), accurate to the last bits also where exp(x) is tiny; 0 at -inf, NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    # log(w) / (w - 1) varies slowly: the rounding of 1 + e cancels
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _combine(decay_0, value_0, decay_1, value_1):
    """Steps 0, then 1. A decay of exactly 0 (a reset) also stops NaN and infinity of the patient before."""
    cut = decay_1 == 0
    return tl.where(cut, 0.0, decay_0 * decay_1), tl.where(cut, value_1, decay_1 * value_0 + value_1)


@triton.jit
def _exp_minus_1(x, TERMS: tl.constexpr):
    """exp(x) - 1 for |x| < 0.5, to the last bits of itself."""
    series = x * (1.0 / (TERMS + 1))
    for i in tl.static_range(TERMS):  # x (1 + x/2 (1 + x/3 (1 + ...)))
        series = x * (1.0 / (TERMS - i)) * (1.0 + series)
    return series


@triton.jit
def _decayed(x, h, added, TERMS: tl.constexpr):
    """exp(x) h + added, with one rounding of h where x is near 0."""
    return tl.where(tl.abs(x) < 0.5, h + (h * _exp_minus_1(x, TERMS) + added), h * tl.exp(x) + added)


@triton.jit
def _two_sum(a, b):
    """A + b rounded, and what the rounding lost (Knuth)."""
    rounded = a + b
    from_b = rounded - a
    return rounded, (a - (rounded - from_b)) + (b - from_b)


@triton.jit
def _carry(x, h, lost, added, cut, TERMS: tl.constexpr):
    """exp(x) (h + lost) + added, rounded, and what that lost; where `cut`, `added` alone."""
    gain = _exp_minus_1(x, TERMS)
    slow = tl.abs(x) < 0.5
    gain = tl.where(slow, (h * gain + added) + lost * (1.0 + gain), (h + lost) * tl.exp(x) + added)
    rounded, lost = _two_sum(tl.where(slow, h, 0.0), gain)
    return tl.where(cut, added, rounded), tl.where(cut, 0.0, lost)


@triton.jit
def _scan_tile(delta, x, a, b, h, segment, reset, TERMS: tl.constexpr):
    """Of each step of a tile, [t, d, n]: the state after it, that state if the tile had begun with 0, what it added.

    Args:
        delta: Step sizes, [t, d].
        x: Inputs, [t, d].
        a: A, [d, n].
        b: B, [t, n].
        h: The state before the tile, [d, n].
        segment: Resets in the tile up to each step, [t].
        reset: Whether the state is zeroed before each step, [t].
    """
    added = (delta * x)[:, :, None] * b[:, None, :]
    decay = tl.where(reset[:, None, None], 0.0, tl.exp(delta[:, :, None] * a[None]))
    _, local = tl.associative_scan((decay, added), 0, _combine)
    total = tl.cumsum(delta, 0)[:, :, None] * a[None]
    carried = _decayed(total, tl.broadcast_to(h[None], total.shape), local, TERMS)
    return tl.where((segment == 0)[:, None, None], carried, local), local, added


@triton.jit
def scan_forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, reset_ptr, y_ptr, final_ptr,
    states_ptr,
    length, channels, state,
    u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step, z_batch, z_step,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, TERMS: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """Grid: batch * blocks of channels. Writes y, the final state, and to `states_ptr` the state before each tile."""
    blocks = tl.cdiv(channels, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    n = tl.arange(0, N)
    real_d, real_n = d < channels, n < state
    real_dn = real_d[:, None] & real_n[None, :]
    dn = d[:, None] * state + n[None, :]
    a = tl.load(A_ptr + dn, mask=real_dn, other=0.0).to(CT)
    h = tl.zeros((BD, N), CT)
    if initial_ptr is not None:
        h = tl.load(initial_ptr + row * channels * state + dn, mask=real_dn, other=0.0).to(CT)
    lost = tl.zeros((BD, N), CT)
    bias = tl.zeros((BD,), CT)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=real_d, other=0.0).to(CT)
    tiles = tl.cdiv(length, T)
    for i in range(0, tiles):
        if states_ptr is not None:
            tl.store(states_ptr + (row * tiles + i) * channels * state + dn, h, mask=real_dn)
        tt = tl.arange(0, T)
        t = (i * T + tt).to(tl.int64)
        real_t = t < length
        real = real_t[:, None] & real_d[None, :]
        real_tn = real_t[:, None] & real_n[None, :]
        x = tl.load(u_ptr + row * u_batch + t[:, None] * u_step + d[None, :], mask=real, other=0.0).to(CT)
        at = delta_ptr + row * delta_batch + t[:, None] * delta_step + d[None, :]
        delta = tl.load(at, mask=real, other=0.0).to(CT) + bias[None]
        if SOFTPLUS:
            delta = _softplus(delta)
        delta = tl.where(real, delta, 0.0)  # steps beyond the end hold the state
        b = tl.load(B_ptr + row * B_batch + t[:, None] * B_step + n[None, :], mask=real_tn, other=0.0).to(CT)
        c = tl.load(C_ptr + row * C_batch + t[:, None] * C_step + n[None, :], mask=real_tn, other=0.0).to(CT)
        reset = tl.zeros((T,), tl.int32)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * length + t, mask=real_t, other=0).to(tl.int32)
        hs, local, _ = _scan_tile(delta, x, a, b, h, tl.cumsum(reset, 0), reset != 0, TERMS)
        y = tl.sum(hs * c[:, None, :], 2)
        if D_ptr is not None:
            y += tl.load(D_ptr + d, mask=real_d, other=0.0).to(CT)[None] * x
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_batch + t[:, None] * z_step + d[None, :], mask=real, other=0.0).to(CT)
            y *= z * _sigmoid(z)
        out = y_ptr + (row * length + t[:, None]) * channels + d[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=real)
        local = tl.sum(tl.where((tt == T - 1)[:, None, None], local, 0.0), 0)
        h, lost = _carry(tl.sum(delta, 0)[:, None] * a, h, lost, local, tl.sum(reset, 0) != 0, TERMS)
    tl.store(final_ptr + row * channels * state + dn, h, mask=real_dn)


@triton.jit
def scan_backward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr, states_ptr, grad_y_ptr,
    grad_final_ptr, grad_u_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_D_ptr, grad_z_ptr,
    grad_bias_ptr, grad_initial_ptr,
    length, channels, state,
    u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step, z_batch, z_step, grad_y_batch,
    grad_y_step,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, TERMS: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """Grid as of the forward; walks from the last tile to the first and computes each tile's states again.

    The gradients of A, D, delta_bias and initial_state are written for each row, those of B and C for each block of
    channels and row: [blocks, batch, length, state].
    """
    blocks = tl.cdiv(channels, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    batch = tl.num_programs(0) // blocks
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, N)
    real_d, real_n = d < channels, n < state
    real_dn = real_d[:, None] & real_n[None, :]
    dn = d[:, None] * state + n[None, :]
    a = tl.load(A_ptr + dn, mask=real_dn, other=0.0).to(CT)
    bias = tl.zeros((BD,), CT)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=real_d, other=0.0).to(CT)
    skip = tl.zeros((BD,), CT)
    if D_ptr is not None:
        skip = tl.load(D_ptr + d, mask=real_d, other=0.0).to(CT)
    q_next = tl.zeros((BD, N), CT)  # gradient of the state after the first step of the tile that follows
    if grad_final_ptr is not None:
        q_next = tl.load(grad_final_ptr + row * channels * state + dn, mask=real_dn, other=0.0).to(CT)
    lost = tl.zeros((BD, N), CT)  # by its rounding
    # Sums over all tiles, and what their rounding lost
    grad_a, lost_a = tl.zeros((BD, N), CT), tl.zeros((BD, N), CT)
    grad_skip, lost_skip = tl.zeros((BD,), CT), tl.zeros((BD,), CT)
    grad_bias, lost_bias = tl.zeros((BD,), CT), tl.zeros((BD,), CT)
    first_decay = tl.zeros((BD, N), CT)
    tiles = tl.cdiv(length, T)
    for j in range(0, tiles):
        # 1. The tile's inputs, and the step sizes and resets of the steps that follow each.
        i = tiles - 1 - j
        tt = tl.arange(0, T)
        t = (i * T + tt).to(tl.int64)
        real_t, follows = t < length, t + 1 < length
        real = real_t[:, None] & real_d[None, :]
        real_next = follows[:, None] & real_d[None, :]
        real_tn = real_t[:, None] & real_n[None, :]
        td = (row * length + t[:, None]) * channels + d[None, :]
        x = tl.load(u_ptr + row * u_batch + t[:, None] * u_step + d[None, :], mask=real, other=0.0).to(CT)
        at = delta_ptr + row * delta_batch + t[:, None] * delta_step + d[None, :]
        before = tl.load(at, mask=real, other=0.0).to(CT) + bias[None]
        delta = before
        delta_next = tl.load(at + delta_step, mask=real_next, other=0.0).to(CT) + bias[None]
        if SOFTPLUS:
            delta = _softplus(delta)
            delta_next = _softplus(delta_next)
        delta = tl.where(real, delta, 0.0)
        delta_next = tl.where(real_next, delta_next, 0.0)
        b = tl.load(B_ptr + row * B_batch + t[:, None] * B_step + n[None, :], mask=real_tn, other=0.0).to(CT)
        c = tl.load(C_ptr + row * C_batch + t[:, None] * C_step + n[None, :], mask=real_tn, other=0.0).to(CT)
        reset = tl.zeros((T,), tl.int32)
        reset_next = tl.zeros((T,), tl.int32)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * length + t, mask=real_t, other=0).to(tl.int32)
            reset_next = tl.load(reset_ptr + row * length + t + 1, mask=follows, other=0).to(tl.int32)

        # 2. The states again.
        h = tl.load(states_ptr + (row * tiles + i) * channels * state + dn, mask=real_dn, other=0.0)
        hs, _, added = _scan_tile(delta, x, a, b, h, tl.cumsum(reset, 0), reset != 0, TERMS)

        # 3. Gate and skip.
        g = tl.zeros((T, BD), CT)
        if grad_y_ptr is not None:
            at = grad_y_ptr + row * grad_y_batch + t[:, None] * grad_y_step + d[None, :]
            g = tl.load(at, mask=real, other=0.0).to(CT)
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_batch + t[:, None] * z_step + d[None, :], mask=real, other=0.0).to(CT)
            s = _sigmoid(z)
            y = tl.sum(hs * c[:, None, :], 2) + skip[None] * x
            grad_z = g * y * s * (1.0 + z * (1.0 - s))
            tl.store(grad_z_ptr + td, grad_z.to(grad_z_ptr.dtype.element_ty), mask=real)
            g = g * z * s
        grad_skip, missing = _two_sum(grad_skip, tl.sum(g * x, 0))
        lost_skip += missing

        # 4. Gradients of the states, backwards: q_t = g_t C_t + exp(delta_{t+1} A) q_{t+1}.
        from_y = g[:, :, None] * c[:, None, :]
        decay_next = tl.exp(delta_next[:, :, None] * a[None])
        decay_next = tl.where((reset_next != 0)[:, None, None], 0.0, decay_next)
        _, local = tl.associative_scan((decay_next, from_y), 0, _combine, reverse=True)
        total = tl.cumsum(delta_next, 0, reverse=True)[:, :, None] * a[None]
        carried = _decayed(total, tl.broadcast_to(q_next[None], total.shape), local, TERMS)
        cut = tl.cumsum(reset_next, 0, reverse=True) != 0
        q = tl.where(cut[:, None, None], local, carried)
        first = tt == 0
        local = tl.sum(tl.where(first[:, None, None], local, 0.0), 0)
        total = tl.sum(delta_next, 0)[:, None] * a
        q_next, lost = _carry(total, q_next, lost, local, tl.sum(reset_next, 0) != 0, TERMS)
        delta_first = tl.sum(tl.where(first[:, None], delta, 0.0), 0)
        reset_first = tl.sum(tl.where(first, reset, 0), 0)
        first_decay = tl.where(reset_first != 0, 0.0, tl.exp(delta_first[:, None] * a))

        # 5. What the states were made of.
        q_decayed = q * (hs - added)  # q exp(delta A) h_{t-1}, the gradient of delta A
        q_b = tl.sum(q * b[:, None, :], 2)
        grad_delta = q_b * x + tl.sum(q_decayed * a[None], 2)
        grad_a, missing = _two_sum(grad_a, tl.sum(q_decayed * delta[:, :, None], 0))
        lost_a += missing
        if SOFTPLUS:
            grad_delta = grad_delta * _sigmoid(before)
        grad_delta = tl.where(real, grad_delta, 0.0)
        grad_bias, missing = _two_sum(grad_bias, tl.sum(grad_delta, 0))
        lost_bias += missing
        grad_u = q_b * delta + g * skip[None]
        tl.store(grad_u_ptr + td, grad_u.to(grad_u_ptr.dtype.element_ty), mask=real)
        tl.store(grad_delta_ptr + td, grad_delta.to(grad_delta_ptr.dtype.element_ty), mask=real)
        tn = ((block * batch + row) * length + t[:, None]) * state + n[None, :]
        tl.store(grad_B_ptr + tn, tl.sum(q * (delta * x)[:, :, None], 1), mask=real_tn)
        tl.store(grad_C_ptr + tn, tl.sum(hs * g[:, :, None], 1), mask=real_tn)
    # 6. Sums over the row.
    tl.store(grad_A_ptr + row * channels * state + dn, grad_a + lost_a, mask=real_dn)
    if grad_initial_ptr is not None:
        # The masked product, so that a reset at step 0 gives 0 whatever q is.
        grad_initial = tl.where(first_decay == 0, 0.0, first_decay * q_next)
        tl.store(grad_initial_ptr + row * channels * state + dn, grad_initial, mask=real_dn)
    if grad_D_ptr is not None:
        tl.store(grad_D_ptr + row * channels + d, grad_skip + lost_skip, mask=real_d)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + row * channels + d, grad_bias + lost_bias, mask=real_d)
