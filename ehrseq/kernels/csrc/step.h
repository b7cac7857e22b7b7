// One token through all Mamba blocks of a model, for a batch of rows: float32, the states updated in place.
//
//     norm, in_proj, convolution + SiLU, x_proj, dt_proj, scan step, gate, out_proj, residual
//
// Weights are read where the model keeps them, in its layout, so that a changed weight is never stale. A single row is
// bound by the bytes of the weights: each is read once, in order. More rows share what was read.
#pragma once
#include "scan.h"

namespace ehrseq {

// Weights of one block as `EhrMambaBlock` has them, contiguous. Every field is 8 bytes, packed in this order by
// cpu_step.py; the biases but that of dt_proj may be null.
struct StepLayer {
  const float *norm, *in_weight, *in_bias, *conv_weight, *conv_bias, *x_weight, *dt_weight, *dt_bias, *A_log, *D,
      *out_weight, *out_bias;
  double epsilon;
};

struct StepCall {
  int64_t layers, batch, width, channels, state, rank, kernel, threads;
  const StepLayer* table;  // [layers]
  float* hidden;           // [batch, width]: embeddings in, the last block's output out
  float *conv_states;      // [layers, slots, channels, kernel - 1]
  float *ssm_states;       // [layers, slots, channels, state]
  const uint8_t* real;     // [batch], 0 at padding, which changes no state; null when there is none
  int64_t slots;           // rows of the states, at least batch
  const int64_t* places;   // [batch], each row's own slot; null: row b stands in slot b
};

// ---------------------------------------------------------------------------------------------------------------------
// y = x W^T. A panel is one vector of outputs: kLanes rows of W. Lanes run along the inputs, in tiles of kTileOutputs
// rows of W by up to kTileRows rows of x whose sums stay in registers; their lanes are added up once a panel.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int kTileOutputs = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif

template <int Rows>
EHRSEQ_INLINE void dot_tile(const float* const* w, const float* x, int64_t x_stride, int64_t inputs,
                            FloatVector* sums) {
  constexpr int W = kLanes<float>;
  FloatVector sum[Rows][kTileOutputs] = {};
  int64_t i = 0;
  for (; i + W <= inputs; i += W) {
    FloatVector weight[kTileOutputs];
    EHRSEQ_UNROLL
    for (int o = 0; o < kTileOutputs; o++) {
      weight[o] = load<float>(w[o] + i, W);
      if (Rows == 1) __builtin_prefetch(w[o] + i + 256);
    }
    EHRSEQ_UNROLL
    for (int b = 0; b < Rows; b++) {
      const FloatVector value = load<float>(x + b * x_stride + i, W);
      EHRSEQ_UNROLL
      for (int o = 0; o < kTileOutputs; o++) sum[b][o] = fused(weight[o], value, sum[b][o]);
    }
  }
  if (i < inputs) {
    const int lanes = int(inputs - i);
    for (int o = 0; o < kTileOutputs; o++) {
      const FloatVector weight = load<float>(w[o] + i, lanes);
      for (int b = 0; b < Rows; b++)
        sum[b][o] = fused(weight, load<float>(x + b * x_stride + i, lanes), sum[b][o]);
    }
  }
  for (int b = 0; b < Rows; b++)
    for (int o = 0; o < kTileOutputs; o++) sums[b * W + o] = sum[b][o];
}

template <int Rows>
EHRSEQ_INLINE void dot_panel(const float* const* w, const float* x, int64_t x_stride, int64_t inputs,
                             FloatVector* out) {
  constexpr int W = kLanes<float>;
  FloatVector sums[Rows * W];
  for (int o = 0; o < W; o += kTileOutputs) dot_tile<Rows>(w + o, x, x_stride, inputs, sums + o);
  for (int b = 0; b < Rows; b++) out[b] = sum_lanes<float>(sums + b * W);
}

// y [batch, outputs] = x [batch, inputs] W^T + bias, or y += that. Shared by the threads of a team.
template <bool Add>
void linear(const float* weight, const float* bias, const float* x, int64_t x_stride, int64_t inputs, float* y,
            int64_t outputs, int64_t batch) {
  constexpr int W = kLanes<float>;
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += W) {
    const int lanes = int(std::min<int64_t>(W, outputs - first));
    const float* w[W];
    for (int o = 0; o < W; o++) w[o] = weight + (first + std::min(o, lanes - 1)) * inputs;
    const FloatVector offset = bias ? load<float>(bias + first, lanes) : FloatVector{};
    for (int64_t b = 0; b < batch;) {
      FloatVector out[kTileRows];
      const float* rows = x + b * x_stride;
      int done = 1;
      if (batch - b >= kTileRows) {
        dot_panel<kTileRows>(w, rows, x_stride, inputs, out), done = kTileRows;
      } else if (batch - b >= 2) {
        dot_panel<2>(w, rows, x_stride, inputs, out), done = 2;
      } else {
        dot_panel<1>(w, rows, x_stride, inputs, out);
      }
      for (int i = 0; i < done; i++, b++) {
        float* target = y + b * outputs + first;
        FloatVector value = out[i] + offset;
        if (Add) value += load<float>(target, lanes);
        store<float>(target, value, lanes);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The rest of a block
// ---------------------------------------------------------------------------------------------------------------------
inline void rms_norm(const float* x, const float* weight, double epsilon, int64_t width, float* out) {
  constexpr int W = kLanes<float>;
  FloatVector squares{};
  for (int64_t i = 0; i < width; i += W) {
    const FloatVector v = load<float>(x + i, int(std::min<int64_t>(W, width - i)));
    squares += v * v;
  }
  double sum = 0;
  for (int i = 0; i < W; i++) sum += squares[i];
  const float scale = float(1.0 / std::sqrt(sum / double(width) + epsilon));
  for (int64_t i = 0; i < width; i += W) {
    const int lanes = int(std::min<int64_t>(W, width - i));
    store<float>(out + i, load<float>(x + i, lanes) * scale * load<float>(weight + i, lanes), lanes);
  }
}

// Working memory of a call, a row for each of the batch but in `rates`.
struct StepBuffers {
  Buffer<float> normed, both, u, low_rank, delta, rates;
  explicit StepBuffers(const StepCall& c)
      : normed(c.batch * c.width),
        both(c.batch * 2 * c.channels),  // the mixed branch, then its gate
        u(c.batch * c.channels),
        low_rank(c.batch * (c.rank + 2 * c.state)),  // low-rank step size, B, C
        delta(c.batch * c.channels),                 // step sizes, then the gated output
        rates(c.channels * c.state) {}               // of the block at hand, for all rows
};

inline bool is_real(const StepCall& call, int64_t b) { return !call.real || call.real[b]; }

// Where the states of a row stand, of all [layers, slots].
inline int64_t slot_of(const StepCall& call, int64_t l, int64_t b) {
  return l * call.slots + (call.places ? call.places[b] : b);
}

// u = silu(convolution); the newest input takes the oldest one's place in the state.
inline void step_conv(const StepCall& call, const StepLayer& layer, int64_t l, int64_t b, const StepBuffers& memory) {
  constexpr int W = kLanes<float>;
  const int64_t past = call.kernel - 1;
  const float* x = memory.both.get() + b * 2 * call.channels;
  float* const states = call.conv_states + slot_of(call, l, b) * call.channels * past;
  const bool real = is_real(call, b);
  for (int64_t first = 0; first < call.channels; first += W) {
    const int lanes = int(std::min<int64_t>(W, call.channels - first));
    FloatVector sum = layer.conv_bias ? load<float>(layer.conv_bias + first, lanes) : FloatVector{};
    for (int i = 0; i < lanes; i++) {
      const float* taps = layer.conv_weight + (first + i) * call.kernel;
      float* state = states + (first + i) * past;
      const float newest = real ? x[first + i] : 0.0f;
      float total = sum[i];
      for (int64_t j = 0; j < past; j++) total += taps[j] * state[j];
      sum[i] = total + taps[past] * newest;
      if (!real || past == 0) continue;
      for (int64_t j = 0; j + 1 < past; j++) state[j] = state[j + 1];
      state[past - 1] = newest;
    }
    store<float>(memory.u.get() + b * call.channels + first, sum * sigmoid<float>(sum), lanes);
  }
}

constexpr float kLog2e = 1.4426950408889634f;

// A * log2(e) of one vector of channels.
inline void step_rates(const StepCall& call, const StepLayer& layer, int64_t first, float* rates) {
  const int64_t end = std::min<int64_t>(first + kLanes<float>, call.channels) * call.state;
  for (int64_t i = first * call.state; i < end; i += kLanes<float>) {
    const int lanes = int(std::min<int64_t>(kLanes<float>, end - i));
    store<float>(rates + i, exp2(load<float>(layer.A_log + i, lanes) * kLog2e) * -kLog2e, lanes);
  }
}

// One vector of channels of one row: step size, state, output, gate. Here lanes are states, as the state is stored; the
// products with C are added up over the lanes for all channels at once.
inline void step_scan(const StepCall& call, const StepLayer& layer, int64_t l, int64_t b, int64_t first,
                      const StepBuffers& memory) {
  constexpr int W = kLanes<float>;
  const int64_t channels = call.channels, state = call.state, projected = call.rank + 2 * state;
  const int lanes = int(std::min<int64_t>(W, channels - first));
  float* const delta = memory.delta.get() + b * channels + first;
  const FloatVector u = load<float>(memory.u.get() + b * channels + first, lanes);
  const FloatVector z = load<float>(memory.both.get() + (2 * b + 1) * channels + first, lanes);
  FloatVector d, slope;
  softplus<float>(load<float>(delta, lanes) + load<float>(layer.dt_bias + first, lanes), d, slope);
  if (!is_real(call, b)) d = FloatVector{};  // nothing is added, the state held
  const FloatVector du = d * u;
  const float* B = memory.low_rank.get() + b * projected + call.rank;
  const float* C = B + state;
  const float* rates = memory.rates.get() + first * state;
  float* const states = call.ssm_states + (slot_of(call, l, b) * channels + first) * state;
  FloatVector products[W] = {};
  for (int64_t n = 0; n < state; n += W) {
    const int some = int(std::min<int64_t>(W, state - n));
    const FloatVector Bn = load<float>(B + n, some), Cn = load<float>(C + n, some);
    for (int i = 0; i < lanes; i++) {
      float* h = states + i * state + n;
      __builtin_prefetch(h + 1024);
      const FloatVector exponent = d[i] * load<float>(rates + i * state + n, some);
      const FloatVector now = exp2_times(exponent, load<float>(h, some)) + du[i] * Bn;
      store<float>(h, now, some);
      products[i] += now * Cn;
    }
  }
  const FloatVector y = sum_lanes<float>(products) + load<float>(layer.D + first, lanes) * u;
  store<float>(delta, y * (z * sigmoid<float>(z)), lanes);
}

// All blocks. Every loop is shared by the threads of the team that calls this, one thread being a team too.
inline void step_blocks(const StepCall& call, const StepBuffers& memory) {
  const FlushDenormals flush;
  const int64_t batch = call.batch, channels = call.channels, projected = call.rank + 2 * call.state;
  for (int64_t l = 0; l < call.layers; l++) {
    const StepLayer& layer = call.table[l];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; b++)
      rms_norm(call.hidden + b * call.width, layer.norm, layer.epsilon, call.width,
               memory.normed.get() + b * call.width);
    linear<false>(layer.in_weight, layer.in_bias, memory.normed.get(), call.width, call.width, memory.both.get(),
                  2 * channels, batch);
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < channels; first += kLanes<float>)
      step_rates(call, layer, first, memory.rates.get());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; b++) step_conv(call, layer, l, b, memory);
    linear<false>(layer.x_weight, nullptr, memory.u.get(), channels, channels, memory.low_rank.get(), projected, batch);
    linear<false>(layer.dt_weight, nullptr, memory.low_rank.get(), projected, call.rank, memory.delta.get(), channels,
                  batch);
#pragma omp for schedule(static) collapse(2)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t first = 0; first < channels; first += kLanes<float>) step_scan(call, layer, l, b, first, memory);
    linear<true>(layer.out_weight, layer.out_bias, memory.delta.get(), channels, channels, call.hidden, call.width,
                 batch);
  }
}

inline void model_step(const StepCall& call) {
  const StepBuffers memory(call);
  if (call.threads <= 1) return step_blocks(call, memory);  // see scan_forward
#pragma omp parallel num_threads(int(call.threads))
  step_blocks(call, memory);
}

}  // namespace ehrseq
