// The selective scan, forward. One pass over the tiles of a task; what leaves the registers is y and, when training, the
// state before each tile.
#pragma once
#include "scan.h"

namespace ehrseq {

// G states of one block through one tile: the state is updated, C . h added to y. `lost`: what the rounding of a slow
// state's sum has lost so far.
template <class T, int G, bool AnySlow>
__attribute__((noinline)) void forward_group(int steps, int padded, unsigned slow, const LongestSteps<T>& longest,
                                             const Vector<T>* rates, const Vector<T>* d, const Vector<T>* du, const T* B,
                                             const T* C, const uint8_t* resets, const Ahead& ahead, Vector<T>* state,
                                             Vector<T>* lost, Vector<T>* y) {
  typedef Vector<T> V;
  V before[G], h[G];  // h: the state; in a slow lane, its gain over `before`
  EHRSEQ_UNROLL
  for (int n = 0; n < G; n++) {
    before[n] = AnySlow ? longest.slow_lanes(rates[n], state[n]) : V{};
    h[n] = AnySlow ? (state[n] - before[n]) + lost[n] : state[n] + lost[n];
  }
  for (int t = 0; t < steps; t++, B += padded, C += padded) {
    ahead.fetch(t);
    if (resets && resets[t]) {
      EHRSEQ_UNROLL
      for (int n = 0; n < G; n++) before[n] = h[n] = V{};
    }
    const V step = d[t], step_u = du[t];
    V even = y[t], odd{};  // two sums: half the chain of dependent additions
    EHRSEQ_UNROLL
    for (int n = 0; n < G; n++) {
      const V x = step * rates[n];
      V now;
      if constexpr (AnySlow) {
        now = before[n] + h[n];
        if (slow >> n & 1) {
          h[n] += exp2_minus_1_small(x) * now;
        } else {
          const PowerOf2<V> power = power_of_2(x);
          h[n] = scale_by(power.m * now + h[n], power);  // by 1 in a slow lane
        }
        h[n] += step_u * B[n];
        now = before[n] + h[n];
      } else {
        now = h[n] = exp2_times(x, h[n]) + step_u * B[n];
      }
      (n % 2 ? odd : even) += now * C[n];
    }
    y[t] = even + odd;
  }
  EHRSEQ_UNROLL
  for (int n = 0; n < G; n++) {
    if (AnySlow) {
      two_sum(before[n], h[n], state[n], lost[n]);
    } else {
      state[n] = h[n], lost[n] = V{};
    }
  }
}

template <class T, int G> void scan_forward(const ScanCall& call) {
  typedef Vector<T> V;
  const ScanPlan<T> plan(call, G);
  const int padded = plan.padded;
  const int64_t task_blocks = plan.blocks / call.splits + 1;
  const int64_t threads = std::max<int64_t>(1, std::min(call.threads, plan.tasks()));
  const Buffer<V> states(threads * task_blocks * 2 * padded);  // of each block: the states, then what they lost
  const Buffer<T> scalars(threads * 2 * kTile * padded);

  auto work = [&](int thread, int64_t task) {
    alignas(64) V d[kTile], u[kTile], y[kTile];
    uint8_t reset_bytes[kTile];
    V* h = states.get() + thread * task_blocks * 2 * padded;
    V* lost = h + task_blocks * padded;
    T *B = scalars.get() + thread * 2 * kTile * padded, *C = B + kTile * padded;
    const int64_t b = task / call.splits, k0 = plan.first_block(task % call.splits),
                  k1 = plan.first_block(task % call.splits + 1);
    plan.read_state(call.initial_state, b, k0, k1, h);
    std::fill(lost, lost + (k1 - k0) * padded, V{});
    for (int64_t tile = 0; tile < plan.tiles; tile++) {
      const int64_t t = tile * kTile;
      const int steps = plan.steps(tile);
      load_scalars<T>(call.B, b, t, steps, plan.state, padded, B);
      load_scalars<T>(call.C, b, t, steps, plan.state, padded, C);
      const uint8_t* resets = plan.resets(b, t, steps, reset_bytes);
      for (int64_t k = k0; k < k1; k++) {
        const int lanes = plan.lanes(k);
        V* state = h + (k - k0) * padded;
        if (call.tile_states) {
          T* kept = plan.tile_state(b, tile, k);
          for (int n = 0; n < plan.state; n++) store<T>(kept + n * call.channels, state[n], lanes);
        }
        Ahead ahead;
        if (k + 1 < k1)
          for (const Rows* rows : {&call.u, &call.delta, &call.z}) ahead.add(*rows, b, t, (k + 1) * kLanes<T>);
        // 1. Step sizes, skip.
        step_sizes<T>(plan, b, t, k, steps, d, nullptr);
        load_tile<T>(call.u, b, t, k * kLanes<T>, steps, lanes, u);
        const V D = plan.parameter(call.D, k);
        for (int i = 0; i < steps; i++) y[i] = D * u[i], u[i] *= d[i];
        // 2. Recurrence.
        const V* rates = plan.rates.get() + k * padded;
        const LongestSteps<T> longest(d, steps, lanes);
        const T *fastest = plan.fastest.get() + k * padded, *slowest = plan.slowest.get() + k * padded;
        for (int n = 0; n < padded; n += G) {
          const SlowStates slow = slow_states<T, G>(longest, fastest + n, slowest + n);
          V* to_lost = lost + (k - k0) * padded + n;
          const auto group = slow.any ? forward_group<T, G, kHasSlow<T>> : forward_group<T, G, false>;
          group(steps, padded, slow.all_lanes, longest, rates + n, d, u, B + n, C + n, resets, ahead, state + n,
                to_lost, y);
          ahead = Ahead();
        }
        // 3. Gate.
        if (call.z.data) {
          load_tile<T>(call.z, b, t, k * kLanes<T>, steps, lanes, u);
          for (int i = 0; i < steps; i++) y[i] *= u[i] * sigmoid<T>(u[i]);
        }
        store_tile<T>(call.y, b, t, k * kLanes<T>, steps, lanes, y);
      }
    }
    plan.write_state(call.final_state, b, k0, k1, h);
  };

  run_tasks(call.threads, plan.tasks(), work);
}

}  // namespace ehrseq
