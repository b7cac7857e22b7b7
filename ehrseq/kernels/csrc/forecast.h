// One token of a forecast: the newest event of each row through the whole model, float32.
//
//     embedding, all blocks (step.h), final norm, head, exp of the logits; then a draw by inverse distribution function
//
// Every number of a row is computed in the same order of operations whatever the other rows, their number and the
// threads: what is drawn for a trajectory does not depend on what is drawn beside it.
#pragma once
#include "step.h"

namespace ehrseq {

// Every field is 8 bytes, packed in this order by cpu_forecast.py, as are those of StepCall before it.
struct ForecastCall {
  StepCall step;  // `hidden` is working memory here
  int64_t vocabulary, time_size, asked;
  const float *words, *types, *orders, *segments;            // embedding tables [.., width]
  const float *time_w, *time_phi, *age_w, *age_phi;          // [time_size] each
  const float *project, *project_bias;                       // [width, width + 2 time_size], [width]
  const float *layer_weight, *layer_bias, *norm, *head;      // [width] x 3, [vocabulary, width]
  double layer_epsilon, norm_epsilon;
  const int64_t *ids, *type_ids, *order_ids, *segment_ids;   // [batch], within their tables
  const float *differences, *ages;                           // [batch], weeks since the token before; years
  const int64_t* asked_ids;                                  // [asked]
  float* normed;                                             // out [batch, width], what the head reads
  float* weights;                                            // out [batch, vocabulary], exp(logit - largest)
  double* totals;                                            // out [batch], their sums
  double* probabilities;                                     // out [batch, asked]
};

struct DrawCall {
  int64_t batch, vocabulary, most;
  float* weights;            // [batch, vocabulary], at least 0; changed where tokens are avoided
  const double* uniforms;    // [batch], within [0, 1)
  const int64_t* ids;        // of all sets, one behind the other
  const int64_t* starts;     // [sets + 1]
  const int64_t* avoided;    // [batch], the set whose tokens are less likely; null: none
  const double* kept;        // [batch, most], by what their weights are multiplied
  int64_t* drawn;            // out [batch], -1 where all weights are 0
};

constexpr int64_t kDrawBlock = 64;  // weights that are summed before the search looks closer

// tanh from 2^x - 1: to the last bits of itself near 0 as well.
inline FloatVector tanh_of(FloatVector x) {
  const FloatVector limit = splat(10.0f);  // 1 to the last bit
  x = x > limit ? limit : x < -limit ? -limit : x;
  const FloatVector e = exp2_minus_1(x * (2.0f * kLog2e));
  return e / (e + 2.0f);
}

// [concept; sin(w difference + phi); sin(w age + phi)]
inline void forecast_inputs(const ForecastCall& call, int64_t b, float* out) {
  const int64_t width = call.step.width, size = call.time_size;
  memcpy(out, call.words + call.ids[b] * width, size_t(width) * sizeof(float));
  for (int64_t i = 0; i < size; i++) out[width + i] = std::sin(call.differences[b] * call.time_w[i] + call.time_phi[i]);
  for (int64_t i = 0; i < size; i++) out[width + size + i] = std::sin(call.ages[b] * call.age_w[i] + call.age_phi[i]);
}

// tanh of the projection, where the token stands, LayerNorm
inline void forecast_embedding(const ForecastCall& call, int64_t b) {
  constexpr int W = kLanes<float>;
  const int64_t width = call.step.width;
  float* x = call.step.hidden + b * width;
  const float* tables[] = {call.types + call.type_ids[b] * width, call.orders + call.order_ids[b] * width,
                           call.segments + call.segment_ids[b] * width};
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < width; i += W) {
    const int lanes = int(std::min<int64_t>(W, width - i));
    FloatVector v = tanh_of(load<float>(x + i, lanes));
    for (const float* table : tables) v += load<float>(table + i, lanes);
    store<float>(x + i, v, lanes);
  }
  for (int64_t i = 0; i < width; i++) sum += x[i];
  const double mean = sum / double(width);
  for (int64_t i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
  const double scale = 1.0 / std::sqrt(squares / double(width) + call.layer_epsilon);
  for (int64_t i = 0; i < width; i++)
    x[i] = float((x[i] - mean) * scale) * call.layer_weight[i] + call.layer_bias[i];
}

// exp of a row's logits, in their place, and the probabilities that are asked for
inline void forecast_weights(const ForecastCall& call, int64_t b) {
  constexpr int W = kLanes<float>;
  const int64_t size = call.vocabulary;
  float* w = call.weights + b * size;
  FloatVector most = splat(w[0]);
  for (int64_t i = 0; i + W <= size; i += W) {
    const FloatVector v = load<float>(w + i, W);
    most = v > most ? v : most;
  }
  float largest = w[0];
  for (int i = 0; i < W; i++) largest = std::max(largest, most[i]);
  for (int64_t i = size / W * W; i < size; i++) largest = std::max(largest, w[i]);
  double total = 0;
  for (int64_t first = 0; first < size; first += kDrawBlock) {
    const int64_t end = std::min(first + kDrawBlock, size);
    FloatVector sum{};
    for (int64_t i = first; i < end; i += W) {
      const int lanes = int(std::min<int64_t>(W, end - i));
      const FloatVector v = exp2((load<float>(w + i, lanes) - largest) * kLog2e);
      store<float>(w + i, v, lanes);
      if (lanes == W) {
        sum += v;
      } else {
        for (int j = 0; j < lanes; j++) sum[j] += v[j];
      }
    }
    for (int i = 0; i < W; i++) total += sum[i];
  }
  call.totals[b] = total;
  for (int64_t i = 0; i < call.asked; i++)
    call.probabilities[b * call.asked + i] = double(w[call.asked_ids[i]]) / total;
}

inline void forecast_rows(const ForecastCall& call, const StepBuffers& memory, float* inputs) {
  const FlushDenormals flush;
  const StepCall& step = call.step;
  const int64_t joined = step.width + 2 * call.time_size;
#pragma omp for schedule(static)
  for (int64_t b = 0; b < step.batch; b++) forecast_inputs(call, b, inputs + b * joined);
  linear<false>(call.project, call.project_bias, inputs, joined, joined, step.hidden, step.width, step.batch);
#pragma omp for schedule(static)
  for (int64_t b = 0; b < step.batch; b++) forecast_embedding(call, b);
  step_blocks(step, memory);
#pragma omp for schedule(static)
  for (int64_t b = 0; b < step.batch; b++)
    rms_norm(step.hidden + b * step.width, call.norm, call.norm_epsilon, step.width, call.normed + b * step.width);
  linear<false>(call.head, nullptr, call.normed, step.width, step.width, call.weights, call.vocabulary, step.batch);
#pragma omp for schedule(static)
  for (int64_t b = 0; b < step.batch; b++) forecast_weights(call, b);
}

inline void forecast_step(const ForecastCall& call) {
  const StepBuffers memory(call.step);
  const Buffer<float> inputs(call.step.batch * (call.step.width + 2 * call.time_size));
  if (call.step.threads <= 1) return forecast_rows(call, memory, inputs.get());  // see scan_forward
#pragma omp parallel num_threads(int(call.step.threads))
  forecast_rows(call, memory, inputs.get());
}

// The first token at which the summed weights exceed the uniform's share of all; none of weight 0.
inline int64_t draw_row(const DrawCall& call, int64_t b, double* sums) {
  constexpr int W = kLanes<float>;
  const int64_t size = call.vocabulary, blocks = (size + kDrawBlock - 1) / kDrawBlock;
  float* w = call.weights + b * size;
  if (call.avoided) {
    const int64_t set = call.avoided[b], first = call.starts[set], count = call.starts[set + 1] - first;
    for (int64_t i = 0; i < count; i++) {
      float& weight = w[call.ids[first + i]];
      weight = float(weight * call.kept[b * call.most + i]);
    }
  }
  double total = 0;
  for (int64_t k = 0; k < blocks; k++) {
    FloatVector sum{};
    const int64_t end = std::min((k + 1) * kDrawBlock, size);
    for (int64_t i = k * kDrawBlock; i < end; i += W)
      sum += load<float>(w + i, int(std::min<int64_t>(W, end - i)));
    double of_block = 0;
    for (int i = 0; i < W; i++) of_block += sum[i];
    sums[k] = total += of_block;
  }
  const double target = call.uniforms[b] * total;
  const int64_t block = std::upper_bound(sums, sums + blocks, target) - sums;
  if (block == blocks) return -1;  // all are 0
  double through = block ? sums[block - 1] : 0.0;
  const int64_t end = std::min((block + 1) * kDrawBlock, size);
  int64_t last = -1;  // where rounding leaves the target beyond the block: its last possible token
  for (int64_t i = block * kDrawBlock; i < end; i++) {
    if (!(w[i] > 0)) continue;
    through += w[i], last = i;
    if (through > target) break;
  }
  return last;
}

inline void forecast_draw(const DrawCall& call) {
  const FlushDenormals flush;
  const Buffer<double> sums((call.vocabulary + kDrawBlock - 1) / kDrawBlock);
  for (int64_t b = 0; b < call.batch; b++) call.drawn[b] = draw_row(call, b, sums.get());
}

}  // namespace ehrseq
