// The selective scan, backward, from the last tile to the first. The states of a tile are computed again from the one
// that the forward stored before it.
//
// With g_t the gradient of C_t h_t, and q_t that of h_t: q_t = g_t C_t + a_{t+1} q_{t+1}, a_t = exp(d_t A), and
//     dC_t = g_t h_t        dB_t = q_t d_t u_t        d(d_t u_t) = B_t q_t        d(d_t A) = q_t a_t h_{t-1},
// summed over channels (B, C), states (d, u), or steps (A).
#pragma once
#include "scan.h"

namespace ehrseq {

// G states of one block through one tile, there and back.
template <class T, int G> struct BackwardGroup {
  typedef Vector<T> V;
  V decays[kTile * G];        // a_t - 1
  V states[(kTile + 1) * G];  // before the tile, then after each step
  V zeros[G];                 // the state before a reset's step

  // As forward_group, from the states in `states`, and keeping what it computes.
  template <bool AnySlow>
  __attribute__((noinline)) void recompute(int steps, int padded, unsigned slow, const LongestSteps<T>& longest,
                                           const V* rates, const V* d, const V* du, const T* B, const T* C,
                                           const uint8_t* resets, const Ahead& ahead, V* y) {
    V before[G], h[G];
    EHRSEQ_UNROLL
    for (int n = 0; n < G; n++) {
      before[n] = AnySlow ? longest.slow_lanes(rates[n], states[n]) : V{};
      h[n] = AnySlow ? states[n] - before[n] : states[n];
    }
    for (int t = 0; t < steps; t++, B += padded, C += padded) {
      ahead.fetch(t);
      if (resets && resets[t]) {
        EHRSEQ_UNROLL
        for (int n = 0; n < G; n++) before[n] = h[n] = V{};
      }
      const V step = d[t], step_u = du[t];
      V even = y[t], odd{};
      EHRSEQ_UNROLL
      for (int n = 0; n < G; n++) {
        const V x = step * rates[n];
        V decay, now;
        if constexpr (AnySlow) {
          decay = slow >> n & 1 ? exp2_minus_1_small(x) : exp2_minus_1(x);
          h[n] += decay * (before[n] + h[n]);
          h[n] += step_u * B[n];
          now = before[n] + h[n];
        } else {
          decay = exp2_minus_1(x);
          h[n] += decay * h[n];
          now = h[n] += step_u * B[n];
        }
        decays[t * G + n] = decay;
        states[(t + 1) * G + n] = now;
        (n % 2 ? odd : even) += now * C[n];
      }
      y[t] = even + odd;
    }
  }

  // `state`: in, the gradient of the state after the tile from all that follows; out, of the state before it; `lost` as
  // in forward_group. `grad_du`: of d_t u_t. `grad_exponent`: sum over the states of rate * d(d_t A). `sum_B`, `sum_C`:
  // [steps, padded], per lane; the lanes are summed once all blocks are through.
  template <bool AnySlow>
  __attribute__((noinline)) void reverse(int steps, int padded, const LongestSteps<T>& longest, const V* rates,
                                         const V* d, const V* du, const V* g, const T* B, const T* C,
                                         const uint8_t* resets, V* state, V* lost, V* grad_A, V* lost_A, V* grad_du,
                                         V* grad_exponent, V* sum_B, V* sum_C) {
    V after[G], q[G], sum_A[G];  // q: the gradient; in a slow lane, its gain over `after`
    EHRSEQ_UNROLL
    for (int n = 0; n < G; n++) {
      after[n] = AnySlow ? longest.slow_lanes(rates[n], state[n]) : V{}, sum_A[n] = V{};
      q[n] = AnySlow ? (state[n] - after[n]) + lost[n] : state[n] + lost[n];
    }
    for (int t = steps - 1; t >= 0; t--) {
      const V step = d[t], step_u = du[t], gradient = g[t];
      const T *Bt = B + t * padded, *Ct = C + t * padded;
      V *to_B = sum_B + t * padded, *to_C = sum_C + t * padded;
      const bool reset = resets && resets[t];
      const V* previous = reset ? zeros : states + t * G;
      V to_du = grad_du[t], to_exponent = grad_exponent[t];
      EHRSEQ_UNROLL
      for (int n = 0; n < G; n++) {
        const V decay = decays[t * G + n];
        V here = q[n] + gradient * Ct[n], earlier;  // of h_t; through the decay, of h_{t-1}
        if (AnySlow) {
          q[n] = here, here += after[n];
          q[n] += decay * here;
          earlier = after[n] + q[n];
        } else {
          q[n] = earlier = decay * here + here;
        }
        to_C[n] += gradient * states[(t + 1) * G + n];
        to_B[n] += here * step_u;
        to_du += here * Bt[n];
        const V exponent = earlier * previous[n];
        to_exponent += exponent * rates[n];
        sum_A[n] += exponent * step;
      }
      grad_du[t] = to_du, grad_exponent[t] = to_exponent;
      if (reset) {
        EHRSEQ_UNROLL
        for (int n = 0; n < G; n++) q[n] = after[n] = V{};  // set, not multiplied by 0: a NaN stays in its own segment
      }
    }
    EHRSEQ_UNROLL
    for (int n = 0; n < G; n++) {
      add_exactly(grad_A[n], lost_A[n], sum_A[n]);
      if (AnySlow) {
        two_sum(after[n], q[n], state[n], lost[n]);
      } else {
        state[n] = q[n], lost[n] = V{};
      }
    }
  }
};

template <class T, int G> void scan_backward(const ScanCall& call) {
  typedef Vector<T> V;
  constexpr int W = kLanes<T>;
  const ScanPlan<T> plan(call, std::max(G, W));  // whole vectors of sums over the lanes
  const int padded = plan.padded;
  const int64_t task_blocks = plan.blocks / call.splits + 1, rows = call.batch * call.length;
  const int64_t threads = std::max<int64_t>(1, std::min(call.threads, plan.tasks()));
  // Per thread: gradients of the states and what they lost; sums for B and C; the tile's B and C; one group.
  const int64_t thread_vectors = 2 * task_blocks * padded + 2 * kTile * padded;
  const Buffer<V> vectors(threads * thread_vectors);
  const Buffer<T> scalars(threads * 2 * kTile * padded);
  const Buffer<BackwardGroup<T, G>> groups(threads);
  // Per task, added up at the end: what each split of the channels gives to B and C, each batch row to A, D, bias.
  const Buffer<T> part_B(call.splits * rows * plan.state), part_C(call.splits * rows * plan.state);
  const int width_A = padded + 2;
  const Buffer<V> part_A(call.batch * plan.blocks * 2 * width_A);  // the sums, then what they lost

  auto work = [&](int thread, int64_t task) {
    alignas(64) V d[kTile], slopes[kTile], u[kTile], du[kTile], y[kTile], g[kTile], grad_y[kTile], grad_du[kTile],
        grad_exponent[kTile];
    uint8_t reset_bytes[kTile];
    V* q = vectors.get() + thread * thread_vectors;
    V *lost = q + task_blocks * padded, *sum_B = lost + task_blocks * padded, *sum_C = sum_B + kTile * padded;
    T *B = scalars.get() + thread * 2 * kTile * padded, *C = B + kTile * padded;
    auto& group = groups.get()[thread];
    std::fill(group.zeros, group.zeros + G, V{});
    const int64_t split = task % call.splits, b = task / call.splits, k0 = plan.first_block(split),
                  k1 = plan.first_block(split + 1);
    plan.read_state(call.grad_final_state, b, k0, k1, q);
    std::fill(lost, lost + (k1 - k0) * padded, V{});
    V* parts = part_A.get() + b * plan.blocks * 2 * width_A;
    std::fill(parts + k0 * 2 * width_A, parts + k1 * 2 * width_A, V{});
    for (int64_t tile = plan.tiles - 1; tile >= 0; tile--) {
      const int64_t t = tile * kTile;
      const int steps = plan.steps(tile);
      load_scalars<T>(call.B, b, t, steps, plan.state, padded, B);
      load_scalars<T>(call.C, b, t, steps, plan.state, padded, C);
      const uint8_t* resets = plan.resets(b, t, steps, reset_bytes);
      std::fill(sum_B, sum_B + 2 * kTile * padded, V{});
      for (int64_t k = k0; k < k1; k++) {
        const int lanes = plan.lanes(k);
        const int64_t channel = k * W;
        V *to_A = parts + k * 2 * width_A, *lost_A = to_A + width_A;
        Ahead ahead;
        if (k + 1 < k1)
          for (const Rows* rows : {&call.u, &call.delta, &call.z, &call.grad_y}) ahead.add(*rows, b, t, channel + W);
        // 1. Step sizes, skip, gate.
        step_sizes<T>(plan, b, t, k, steps, d, slopes);
        load_tile<T>(call.u, b, t, channel, steps, lanes, u);
        const V D = plan.parameter(call.D, k);
        for (int i = 0; i < steps; i++) {
          du[i] = d[i] * u[i], y[i] = D * u[i];
          grad_du[i] = V{}, grad_exponent[i] = V{}, grad_y[i] = V{};
        }
        if (call.grad_y.data) load_tile<T>(call.grad_y, b, t, channel, steps, lanes, grad_y);
        V z[kTile];
        if (call.z.data) {
          load_tile<T>(call.z, b, t, channel, steps, lanes, z);
          for (int i = 0; i < steps; i++) g[i] = grad_y[i] * z[i] * sigmoid<T>(z[i]);
        } else {
          for (int i = 0; i < steps; i++) g[i] = grad_y[i];
        }
        // 2. Recurrence, a group of states at a time.
        const V* rates = plan.rates.get() + k * padded;
        const T* kept = plan.tile_state(b, tile, k);
        const LongestSteps<T> longest(d, steps, lanes);
        const T *fastest = plan.fastest.get() + k * padded, *slowest = plan.slowest.get() + k * padded;
        for (int n = 0; n < plan.state; n += G) {
          const SlowStates slow = slow_states<T, G>(longest, fastest + n, slowest + n);
          for (int m = 0; m < G; m++)
            group.states[m] = n + m < plan.state ? load<T>(kept + (n + m) * call.channels, lanes) : V{};
          const int64_t of_block = (k - k0) * padded + n;
          auto there_and_back = [&](auto any_slow) {
            group.template recompute<any_slow.value>(steps, padded, slow.all_lanes, longest, rates + n, d, du, B + n,
                                                     C + n, resets, ahead, y);
            group.template reverse<any_slow.value>(steps, padded, longest, rates + n, d, du, g, B + n, C + n, resets,
                                                   q + of_block, lost + of_block, to_A + n, lost_A + n, grad_du, grad_exponent,
                                                   sum_B + n, sum_C + n);
          };
          if (slow.any) {
            there_and_back(std::bool_constant<kHasSlow<T>>{});
          } else {
            there_and_back(std::bool_constant<false>{});
          }
          ahead = Ahead();
        }
        // 3. Gate, skip, step sizes.
        if (call.z.data) {
          for (int i = 0; i < steps; i++) {
            const V s = sigmoid<T>(z[i]);
            z[i] = grad_y[i] * y[i] * s * (T(1) + z[i] * (T(1) - s));
          }
          store_tile<T>(call.grad_z, b, t, channel, steps, lanes, z);
        }
        V to_D{}, to_bias{};
        for (int i = 0; i < steps; i++) {
          const V grad_delta = (grad_du[i] * u[i] + grad_exponent[i] * T(0.6931471805599453)) * slopes[i];
          to_D += g[i] * u[i], to_bias += grad_delta;
          u[i] = grad_du[i] * d[i] + g[i] * D;
          d[i] = grad_delta;
        }
        store_tile<T>(call.grad_delta, b, t, channel, steps, lanes, d);
        store_tile<T>(call.grad_u, b, t, channel, steps, lanes, u);
        add_exactly(to_A[padded], lost_A[padded], to_D);
        add_exactly(to_A[padded + 1], lost_A[padded + 1], to_bias);
      }
      // 4. B and C: sums over the channels of this split.
      for (auto [sums, parts] : {std::pair(sum_B, part_B.get()), std::pair(sum_C, part_C.get())}) {
        T* out = parts + ((split * call.batch + b) * call.length + t) * plan.state;
        for (int i = 0; i < steps; i++)
          for (int n = 0; n < plan.state; n += W)
            store<T>(out + i * plan.state + n, sum_lanes<T>(sums + i * padded + n), std::min(W, plan.state - n));
      }
    }
    plan.write_state(call.grad_initial_state, b, k0, k1, q);
  };

  // Sums over the tasks: B and C of each batch row, then A, D and bias of each block.
  auto reduce_row = [&](int, int64_t b) {
    const int64_t size = call.length * plan.state;
    for (auto [parts, target] : {std::pair(part_B.get(), call.grad_B), std::pair(part_C.get(), call.grad_C)}) {
      T* out = static_cast<T*>(target) + b * size;
      std::copy(parts + b * size, parts + (b + 1) * size, out);
      for (int64_t split = 1; split < call.splits; split++) {
        const T* part = parts + (split * call.batch + b) * size;
        for (int64_t i = 0; i < size; i++) out[i] += part[i];
      }
    }
  };
  auto reduce_block = [&](int, int64_t k) {
    for (int n = 0; n < width_A; n++) {
      if (n >= plan.state && n < padded) continue;
      V sum{};
      for (int64_t b = 0; b < call.batch; b++) {
        const V* part = part_A.get() + (b * plan.blocks + k) * 2 * width_A + n;
        sum += part[0] + part[width_A];
      }
      T* out = static_cast<T*>(n < padded ? call.grad_A : n == padded ? call.grad_D : call.grad_bias);
      if (!out) continue;
      for (int i = 0; i < plan.lanes(k); i++) {
        const int64_t channel = k * W + i;
        out[n < padded ? channel * plan.state + n : channel] = sum[i];
      }
    }
  };

  run_tasks(call.threads, plan.tasks(), work);
  run_tasks(call.threads, call.batch, reduce_row);
  run_tasks(call.threads, plan.blocks, reduce_block);
}

}  // namespace ehrseq
