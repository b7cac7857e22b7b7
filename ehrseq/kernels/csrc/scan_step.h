// One step of the selective scan without gradients: streaming and generation. The time goes into reading and writing the
// state, so that it is taken as it lies, [channels, state]: here the lanes are states, and no block is transposed.
#pragma once
#include "scan.h"

namespace ehrseq {

template <class T> void scan_step(const ScanCall& call) {
  typedef Vector<T> V;
  constexpr int W = kLanes<T>;
  const int state = int(call.state);
  const int64_t blocks = (call.channels + W - 1) / W;
  const T* const A = static_cast<const T*>(call.A);
  const Buffer<T> scalars(call.batch * 2 * (state + W));  // B and C of each row, 0 beyond the states

  auto work = [&](int64_t task) {
    const int64_t b = task / call.splits, split = task % call.splits;
    T *B = scalars.get() + b * 2 * (state + W), *C = B + state + W;
    const bool reset = call.reset && call.reset[b * call.reset_batch_stride];
    for (int64_t k = blocks * split / call.splits; k < blocks * (split + 1) / call.splits; k++) {
      const int64_t channel = k * W;
      const int lanes = int(std::min<int64_t>(W, call.channels - channel));
      const auto parameter = [&](const void* p) { return p ? load<T>(static_cast<const T*>(p) + channel, lanes) : V{}; };
      // 1. Step size, skip: lanes are channels.
      V u, d, slope;
      load_tile<T>(call.u, b, 0, channel, 1, lanes, &u);
      load_tile<T>(call.delta, b, 0, channel, 1, lanes, &d);
      d += parameter(call.delta_bias);
      if (call.softplus) softplus<T>(d, d, slope);
      const V du = d * u;
      // 2. Recurrence: lanes are states. products[i] is C . h of channel i before its sum.
      V products[W] = {};
      for (int i = 0; i < lanes; i++) {
        const int64_t first = (b * call.channels + channel + i) * state;
        for (int n = 0; n < state; n += W) {
          const int count = std::min(W, state - n);
          const T* before = static_cast<const T*>(call.initial_state) + first + n;
          const V rate = load<T>(A + (channel + i) * state + n, count) * T(1.4426950408889634);
          V h = call.initial_state && !reset ? exp2_times(d[i] * rate, load<T>(before, count)) : V{};
          h += du[i] * load<T>(B + n, W);
          store<T>(static_cast<T*>(call.final_state) + first + n, h, count);
          products[i] += h * load<T>(C + n, W);
        }
      }
      V y = parameter(call.D) * u + sum_lanes<T>(products);
      // 3. Gate.
      if (call.z.data) {
        V z;
        load_tile<T>(call.z, b, 0, channel, 1, lanes, &z);
        y *= z * sigmoid<T>(z);
      }
      store_tile<T>(call.y, b, 0, channel, 1, lanes, &y);
    }
  };

  const FlushDenormals flush;
  for (int64_t b = 0; b < call.batch; b++) {
    T* row = scalars.get() + b * 2 * (state + W);
    load_scalars<T>(call.B, b, 0, 1, state, state + W, row);
    load_scalars<T>(call.C, b, 0, 1, state, state + W, row + state + W);
  }
  run_tasks(call.threads, call.batch * call.splits, [&](int, int64_t task) { work(task); });
}

}  // namespace ehrseq
