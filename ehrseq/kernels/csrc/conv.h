// Causal depthwise convolution over the length with up to kTaps taps, then SiLU, forward and backward.
//
//     s_t = bias + sum_j weight[j] x_{t - kTaps + 1 + j},   out_t = silu(s_t)
//
// Shorter kernels stand at the end of the taps, behind zeros. No tap reaches over a reset; before step 0 stands the
// initial state. Lanes are channels, and the last inputs travel in registers.
#pragma once
#include "scan.h"

namespace ehrseq {

constexpr int kTaps = 4, kPast = kTaps - 1;
// Steps of a tile: few, so that its rows and those it writes are few enough streams for the hardware to foresee.
constexpr int kForwardTile = 8, kBackwardTile = 16;

// One call. Every field is 8 bytes, packed in this order by cpu_library.py; pointers may be null where marked.
struct ConvCall {
  int64_t is_double, batch, length, channels, kernel, splits, threads, silu;
  Rows x, y;
  const void *weight, *bias, *initial_state;  // compute type: [channels, kernel], [channels], [batch, channels, kernel-1]
  const uint8_t* reset;                       // [batch, length]; null without resets
  int64_t reset_batch_stride, reset_row_stride;
  // Backward only
  Rows grad_y, grad_x;
  void *grad_weight, *grad_bias, *grad_initial_state;  // the last two may be null
};

// Sizes of a call, and its weights in the order in which the loops read them.
template <class T, int Tile> struct ConvPlan {
  typedef Vector<T> V;
  static constexpr int W = kLanes<T>;
  static constexpr int kWeights = kTaps + 1;  // the taps, then the bias

  const ConvCall& call;
  const int64_t blocks, tiles;
  const int kernel;
  Buffer<V> weights;  // [blocks, kWeights]

  explicit ConvPlan(const ConvCall& c)
      : call(c),
        blocks((c.channels + W - 1) / W),
        tiles((c.length + Tile - 1) / Tile),
        kernel(int(c.kernel)),
        weights(blocks * kWeights) {
    for (int64_t k = 0; k < blocks; k++) {
      V* out = weights.get() + k * kWeights;
      const T* p = static_cast<const T*>(c.weight) + k * W * kernel;
      for (int j = 0; j < kTaps; j++) {
        const int tap = j - (kTaps - kernel);
        out[j] = V{};
        for (int i = 0; tap >= 0 && i < lanes(k); i++) out[j][i] = p[i * kernel + tap];
      }
      out[kTaps] = c.bias ? load<T>(static_cast<const T*>(c.bias) + k * W, lanes(k)) : V{};
    }
  }

  int lanes(int64_t block) const { return int(std::min<int64_t>(W, call.channels - block * W)); }
  int steps(int64_t tile) const { return int(std::min<int64_t>(Tile, call.length - tile * Tile)); }
  bool resets_at(int64_t b, int64_t t) const {
    return call.reset && call.reset[b * call.reset_batch_stride + t * call.reset_row_stride];
  }

  // The kPast inputs before step t, oldest first; 0 where a reset lies between them and step t - 1.
  void past(int64_t b, int64_t t, int64_t k, V* out) const {
    bool reached = true;
    if (t >= kPast) load_tile<T>(call.x, b, t - kPast, k * W, kPast, lanes(k), out);
    for (int back = 1; back <= kPast; back++) {
      V& v = out[kPast - back];
      if (!reached || back >= kernel) {
        v = V{};
      } else if (t >= back) {
        if (t < kPast) load_tile<T>(call.x, b, t - back, k * W, 1, lanes(k), &v);
        reached = !resets_at(b, t - back);
      } else {
        v = V{};
        if (!call.initial_state) continue;
        const T* p = static_cast<const T*>(call.initial_state) + (b * call.channels + k * W) * (kernel - 1);
        for (int i = 0; i < lanes(k); i++) v[i] = p[i * (kernel - 1) + kernel - 1 - (back - t)];
      }
    }
  }
};

template <class T> void conv_forward(const ConvCall& call) {
  typedef Vector<T> V;
  constexpr int W = kLanes<T>;
  const ConvPlan<T, kForwardTile> plan(call);
  run_tasks(call.threads, call.batch * plan.tiles, [&](int, int64_t task) {
    const int64_t b = task / plan.tiles, tile = task % plan.tiles, t = tile * kForwardTile;
    const int steps = plan.steps(tile);
    V x[kPast + kForwardTile];
    for (int64_t k = 0; k < plan.blocks; k++) {
      const V* weight = plan.weights.get() + k * plan.kWeights;
      plan.past(b, t, k, x);
      load_tile<T>(call.x, b, t, k * W, steps, plan.lanes(k), x + kPast);
      V x0 = x[0], x1 = x[1], x2 = x[2];
      for (int i = 0; i < steps; i++) {
        if (plan.resets_at(b, t + i)) x0 = x1 = x2 = V{};
        const V x3 = x[kPast + i];
        x[i] = weight[kTaps] + weight[0] * x0 + weight[1] * x1 + weight[2] * x2 + weight[3] * x3;
        x0 = x1, x1 = x2, x2 = x3;  // the sum took the place of an input that is in no register's future
      }
      if (call.silu)
        for (int i = 0; i < steps; i++) x[i] *= sigmoid<T>(x[i]);
      store_tile<T>(call.y, b, t, k * W, steps, plan.lanes(k), x);
    }
  });
}

template <class T> void conv_backward(const ConvCall& call) {
  typedef Vector<T> V;
  constexpr int W = kLanes<T>;
  const ConvPlan<T, kBackwardTile> plan(call);
  constexpr int kSums = ConvPlan<T, kBackwardTile>::kWeights;
  // What a block carries from tile to tile, for each batch row: gradients of the taps and the bias, then what later
  // steps give to the inputs 1, 2, 3 steps before the one at hand.
  constexpr int kCarried = kSums + kPast;
  const Buffer<V> carried(call.batch * plan.blocks * kCarried);
  run_tasks(call.threads, call.batch * call.splits, [&](int, int64_t task) {
    const int64_t b = task / call.splits, split = task % call.splits;
    const int64_t k0 = plan.blocks * split / call.splits, k1 = plan.blocks * (split + 1) / call.splits;
    V* const carry = carried.get() + b * plan.blocks * kCarried;
    std::fill(carry + k0 * kCarried, carry + k1 * kCarried, V{});
    V x[kPast + kBackwardTile], g[kBackwardTile];
    int reach[kBackwardTile];
    for (int64_t tile = plan.tiles - 1; tile >= 0; tile--) {
      const int64_t t = tile * kBackwardTile;
      const int steps = plan.steps(tile);
      // Steps since the last reset, up to kPast; before the tile that is in what `past` gives.
      for (int i = 0, now = kPast; i < steps; i++) reach[i] = now = plan.resets_at(b, t + i) ? 0 : std::min(now + 1, kPast);
      for (int64_t k = k0; k < k1; k++) {
        const int lanes = plan.lanes(k);
        const V* weight = plan.weights.get() + k * kSums;
        V* sums = carry + k * kCarried;
        V next1 = sums[kSums], next2 = sums[kSums + 1], next3 = sums[kSums + 2];
        V sum0 = sums[0], sum1 = sums[1], sum2 = sums[2], sum3 = sums[3], sum4 = sums[4];
        plan.past(b, t, k, x);
        load_tile<T>(call.x, b, t, k * W, steps, lanes, x + kPast);
        load_tile<T>(call.grad_y, b, t, k * W, steps, lanes, g);
        for (int i = steps - 1; i >= 0; i--) {
          V x0 = x[i], x1 = x[i + 1], x2 = x[i + 2];
          const V x3 = x[i + 3];
          const int r = reach[i];
          if (r < kPast) {
            x0 = V{};
            if (r < 2) x1 = V{};
            if (r < 1) x2 = V{};
          }
          V grad = g[i];
          if (call.silu) {
            const V sum = weight[kTaps] + weight[0] * x0 + weight[1] * x1 + weight[2] * x2 + weight[3] * x3;
            const V s = sigmoid<T>(sum);
            grad *= s * (T(1) + sum * (T(1) - s));
          }
          sum0 += grad * x0, sum1 += grad * x1, sum2 += grad * x2, sum3 += grad * x3, sum4 += grad;
          g[i] = next1 + grad * weight[3];
          next1 = next2 + grad * weight[2], next2 = next3 + grad * weight[1], next3 = grad * weight[0];
          if (r < kPast) {
            next3 = V{};
            if (r < 2) next2 = V{};
            if (r < 1) next1 = V{};
          }
        }
        store_tile<T>(call.grad_x, b, t, k * W, steps, lanes, g);
        sums[0] = sum0, sums[1] = sum1, sums[2] = sum2, sums[3] = sum3, sums[4] = sum4;
        sums[kSums] = next1, sums[kSums + 1] = next2, sums[kSums + 2] = next3;
      }
    }
    if (!call.grad_initial_state) return;
    const int past = plan.kernel - 1;
    for (int64_t k = k0; k < k1; k++) {
      T* p = static_cast<T*>(call.grad_initial_state) + (b * call.channels + k * W) * past;
      for (int i = 0; i < plan.lanes(k); i++)
        for (int back = 1; back <= past; back++) p[i * past + past - back] = carry[k * kCarried + kSums + back - 1][i];
    }
  });
  for (int64_t k = 0; k < plan.blocks; k++) {
    for (int j = kTaps - plan.kernel; j < kSums; j++) {
      V sum{};
      for (int64_t b = 0; b < call.batch; b++) sum += carried.get()[(b * plan.blocks + k) * kCarried + j];
      for (int i = 0; i < plan.lanes(k); i++) {
        const int64_t channel = k * W + i;
        if (j < kTaps) static_cast<T*>(call.grad_weight)[channel * plan.kernel + j - (kTaps - plan.kernel)] = sum[i];
        if (j == kTaps && call.grad_bias) static_cast<T*>(call.grad_bias)[channel] = sum[i];
      }
    }
  }
}

}  // namespace ehrseq
