// Causal depthwise convolution over the length with up to kTaps taps, then SiLU, forward and backward.
//
//     s_t = bias + sum_j weight[j] x_{t - kTaps + 1 + j},   out_t = silu(s_t)
//
// Shorter kernels stand at the end of the taps, behind zeros. No tap reaches over a reset; before step 0 stands the
// initial state. Lanes are channels, and the last inputs travel in registers.
#pragma once
#include <omp.h>
#include "scan.h"

namespace ehrseq {

constexpr int kTaps = 4, kPast = kTaps - 1;
constexpr int kConvTile = 64;

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

template <class T> struct ConvBlock {
  typedef Vector<T> V;
  static constexpr int W = kLanes<T>;
  const ConvCall& call;
  const int64_t block;
  const int lanes;
  V weight[kTaps], bias;

  ConvBlock(const ConvCall& c, int64_t k)
      : call(c), block(k), lanes(int(std::min<int64_t>(W, c.channels - k * W))), bias{} {
    const int kernel = int(c.kernel);
    const T* p = static_cast<const T*>(c.weight) + k * W * kernel;
    for (int j = 0; j < kTaps; j++) {
      weight[j] = V{};
      const int tap = j - (kTaps - kernel);
      for (int i = 0; tap >= 0 && i < lanes; i++) weight[j][i] = p[i * kernel + tap];
    }
    if (c.bias) bias = load<T>(static_cast<const T*>(c.bias) + k * W, lanes);
  }

  bool resets_at(int64_t b, int64_t t) const {
    return call.reset && call.reset[b * call.reset_batch_stride + t * call.reset_row_stride];
  }

  // The kPast inputs before step t, oldest first; 0 where a reset lies between them and step t - 1.
  void past(int64_t b, int64_t t, V* out) const {
    const int kernel = int(call.kernel);
    bool reached = true;
    for (int back = 1; back <= kPast; back++) {
      V& v = out[kPast - back];
      v = V{};
      if (!reached || back > kernel - 1) continue;
      if (t >= back) {
        load_tile<T>(call.x, b, t - back, block * W, 1, lanes, &v);
        reached = !resets_at(b, t - back);
      } else if (call.initial_state) {
        const T* p = static_cast<const T*>(call.initial_state) + (b * call.channels + block * W) * (kernel - 1);
        for (int i = 0; i < lanes; i++) v[i] = p[i * (kernel - 1) + kernel - 1 - (back - t)];
      }
    }
  }
};

template <class T, class Work> void conv_tasks(const ConvCall& call, int64_t tasks, Work work) {
  const int threads = int(std::min(call.threads, tasks));
  if (threads <= 1) {  // see scan_forward
    const FlushDenormals flush;
    for (int64_t task = 0; task < tasks; task++) work(task);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) work(task);
  }
}

template <class T> void conv_forward(const ConvCall& call) {
  typedef Vector<T> V;
  constexpr int W = kLanes<T>;
  const int64_t blocks = (call.channels + W - 1) / W, tiles = (call.length + kConvTile - 1) / kConvTile;
  conv_tasks<T>(call, call.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, t = task % tiles * kConvTile;
    const int steps = int(std::min<int64_t>(kConvTile, call.length - t));
    V x[kPast + kConvTile];
    for (int64_t k = 0; k < blocks; k++) {
      const ConvBlock<T> block(call, k);
      block.past(b, t, x);
      load_tile<T>(call.x, b, t, k * W, steps, block.lanes, x + kPast);
      V x0 = x[0], x1 = x[1], x2 = x[2];
      for (int i = 0; i < steps; i++) {
        if (call.reset && block.resets_at(b, t + i)) x0 = x1 = x2 = V{};
        const V x3 = x[kPast + i];
        V sum = block.bias + block.weight[0] * x0 + block.weight[1] * x1 + block.weight[2] * x2 + block.weight[3] * x3;
        x[i] = sum;  // two steps behind the inputs still to come
        x0 = x1, x1 = x2, x2 = x3;
      }
      if (call.silu)
        for (int i = 0; i < steps; i++) x[i] *= sigmoid<T>(x[i]);
      store_tile<T>(call.y, b, t, k * W, steps, block.lanes, x);
    }
  });
}

template <class T> void conv_backward(const ConvCall& call) {
  typedef Vector<T> V;
  constexpr int W = kLanes<T>, kSums = kTaps + 1;  // gradients of the taps and of the bias
  const int64_t blocks = (call.channels + W - 1) / W, tiles = (call.length + kConvTile - 1) / kConvTile;
  const Buffer<V> parts(call.batch * blocks * kSums);
  conv_tasks<T>(call, call.batch * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, k = task % blocks;
    const ConvBlock<T> block(call, k);
    V x[kPast + kConvTile], g[kConvTile], sums[kSums] = {};
    V next1{}, next2{}, next3{};  // what later steps give to the inputs 1, 2, 3 steps before the one at hand
    for (int64_t tile = tiles - 1; tile >= 0; tile--) {
      const int64_t t = tile * kConvTile;
      const int steps = int(std::min<int64_t>(kConvTile, call.length - t));
      block.past(b, t, x);
      load_tile<T>(call.x, b, t, k * W, steps, block.lanes, x + kPast);
      load_tile<T>(call.grad_y, b, t, k * W, steps, block.lanes, g);
      // Steps since the last reset, up to kPast; where step t - 1 stands is in `past` already.
      int8_t reach[kConvTile];
      int now = kPast;
      for (int i = 0; i < steps; i++) {
        now = call.reset && block.resets_at(b, t + i) ? 0 : std::min(now + 1, kPast);
        reach[i] = int8_t(now);
      }
      for (int i = steps - 1; i >= 0; i--) {
        const int r = reach[i];
        const V x3 = x[kPast + i], x2 = r >= 1 ? x[i + 2] : V{}, x1 = r >= 2 ? x[i + 1] : V{}, x0 = r >= 3 ? x[i] : V{};
        V grad = g[i];
        if (call.silu) {
          const V sum = block.bias + block.weight[0] * x0 + block.weight[1] * x1 + block.weight[2] * x2 + block.weight[3] * x3;
          const V s = sigmoid<T>(sum);
          grad *= s * (T(1) + sum * (T(1) - s));
        }
        sums[0] += grad * x0, sums[1] += grad * x1, sums[2] += grad * x2, sums[3] += grad * x3, sums[4] += grad;
        g[i] = next1 + grad * block.weight[3];
        next1 = r >= 1 ? next2 + grad * block.weight[2] : V{};
        next2 = r >= 2 ? next3 + grad * block.weight[1] : V{};
        next3 = r >= 3 ? grad * block.weight[0] : V{};
      }
      store_tile<T>(call.grad_x, b, t, k * W, steps, block.lanes, g);
    }
    if (call.grad_initial_state) {
      const int past = int(call.kernel) - 1;
      const V grads[kPast] = {next3, next2, next1};
      T* p = static_cast<T*>(call.grad_initial_state) + (b * call.channels + k * W) * past;
      for (int i = 0; i < block.lanes; i++)
        for (int j = 0; j < past; j++) p[i * past + j] = grads[kPast - past + j][i];
    }
    for (int j = 0; j < kSums; j++) parts.get()[task * kSums + j] = sums[j];
  });
  for (int64_t k = 0; k < blocks; k++) {
    const int lanes = int(std::min<int64_t>(W, call.channels - k * W)), kernel = int(call.kernel);
    for (int j = kTaps - kernel; j < kSums; j++) {
      V sum{};
      for (int64_t b = 0; b < call.batch; b++) sum += parts.get()[(b * blocks + k) * kSums + j];
      for (int i = 0; i < lanes; i++) {
        const int64_t channel = k * W + i;
        if (j < kTaps) static_cast<T*>(call.grad_weight)[channel * kernel + j - (kTaps - kernel)] = sum[i];
        if (j == kTaps && call.grad_bias) static_cast<T*>(call.grad_bias)[channel] = sum[i];
      }
    }
  }
}

}  // namespace ehrseq
