// The selective scan, forward. One pass over the tiles of a task; what leaves the registers is y and, when training, the
// state before each tile.
#pragma once
#include <omp.h>
#include "scan.h"

namespace ehrseq {

// G states of one block through one tile: h is updated, C . h added to y.
template <class T, int G, bool Small>
EHRSEQ_INLINE void forward_group(int steps, int padded, const Vector<T>* rates, const Vector<T>* d, const Vector<T>* du,
                                 const T* B, const T* C, const uint8_t* resets, const Ahead& ahead, Vector<T>* state,
                                 Vector<T>* y) {
  typedef Vector<T> V;
  V h[G];
  EHRSEQ_UNROLL
  for (int n = 0; n < G; n++) h[n] = state[n];
  for (int t = 0; t < steps; t++, B += padded, C += padded) {
    ahead.fetch(t);
    if (resets && resets[t]) {
      EHRSEQ_UNROLL
      for (int n = 0; n < G; n++) h[n] = V{};
    }
    const V step = d[t], step_u = du[t];
    V even = y[t], odd{};  // two sums: half the chain of dependent additions
    EHRSEQ_UNROLL
    for (int n = 0; n < G; n++) {
      if constexpr (Small) {
        h[n] += exp2_minus_1(step * rates[n]) * h[n] + step_u * B[n];
      } else {
        h[n] = exp2(step * rates[n]) * h[n] + step_u * B[n];
      }
      (n % 2 ? odd : even) += h[n] * C[n];
    }
    y[t] = even + odd;
  }
  EHRSEQ_UNROLL
  for (int n = 0; n < G; n++) state[n] = h[n];
}

template <class T, int G> void scan_forward(const ScanCall& call) {
  typedef Vector<T> V;
  const ScanPlan<T> plan(call, G);
  const int padded = plan.padded;
  const int64_t task_blocks = plan.blocks / call.splits + 1;
  const int threads = int(std::min(call.threads, plan.tasks()));
  const Buffer<V> states(threads * task_blocks * padded);
  const Buffer<T> scalars(threads * 2 * kTile * padded);

  auto work = [&](int thread, int64_t task) {
    alignas(64) V d[kTile], u[kTile], y[kTile];
    uint8_t reset_bytes[kTile];
    V* h = states.get() + thread * task_blocks * padded;
    T *B = scalars.get() + thread * 2 * kTile * padded, *C = B + kTile * padded;
    const int64_t b = task / call.splits, k0 = plan.first_block(task % call.splits),
                  k1 = plan.first_block(task % call.splits + 1);
    plan.read_state(call.initial_state, b, k0, k1, h);
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
        const bool small = is_small<T>(d, steps, plan.fastest.get()[k]);
        for (int n = 0; n < padded; n += G) {
          if (small) {
            forward_group<T, G, sizeof(T) == 4>(steps, padded, rates + n, d, u, B + n, C + n, resets, ahead, state + n, y);
          } else {
            forward_group<T, G, false>(steps, padded, rates + n, d, u, B + n, C + n, resets, ahead, state + n, y);
          }
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

  if (threads <= 1) {  // without OpenMP: its threads do not survive a fork, and asking for them would hang there
    const FlushDenormals flush;
    for (int64_t task = 0; task < plan.tasks(); task++) work(0, task);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.tasks(); task++) work(omp_get_thread_num(), task);
  }
}

}  // namespace ehrseq
