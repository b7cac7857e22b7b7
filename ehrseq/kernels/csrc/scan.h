// The selective scan: what forward and backward share.
//
//     d_t = softplus(delta_t + delta_bias),  h_t = exp(d_t A) h_{t-1} + d_t u_t B_t,  y_t = (C_t h_t + D u_t) silu(z_t)
//
// Lanes are channels. A task is one batch row and a range of channel blocks (a block is one vector of channels); it
// walks over tiles of kTile steps, and inside a tile over its blocks, so that the tile's B and C are converted once. The
// states of a block live in registers, `G` of them at a time.
//
// Slow states. Where d_t A is tiny, 2^x rounds to a multiple of 2^-24 off the truth, often to the same side, and so does
// every addition to the state: over thousands of steps that shows. A lane of a state is slow in a tile when no exponent
// there is above kSmallExponent. It is then kept as the value before the tile (0 in the other lanes) plus the gain since,
// which is small and rounds finely; exp(x) - 1 takes the place of exp(x), with a shorter polynomial where all lanes of
// the state are slow; and what the sum of both loses at the tile's end is carried on. The same holds for the gradient of
// the state on the way back. Groups of states without a lane that remembers for long keep to the common form.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>
#include "rows.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ehrseq {

// Steps of a tile: one stored state each when training, as large as half an activation for 16 states. The backward's
// working set of a tile (decays, states, sums for B and C) should stay near the first-level cache.
constexpr int kTile = 32;

// One call. Every field is 8 bytes, packed in this order by cpu_library.py; pointers may be null where marked.
struct ScanCall {
  int64_t is_double, batch, length, channels, state, splits, threads, softplus;
  Rows u, delta, z, B, C, y;  // z: null without gate
  const void *A, *D, *delta_bias, *initial_state;  // compute type, contiguous; all but A may be null
  const uint8_t* reset;                            // [batch, length]; null without resets
  int64_t reset_batch_stride, reset_row_stride;
  void* final_state;  // [batch, channels, state]
  void* tile_states;  // [batch, tiles, state, channels]: the state before each tile; null when nobody needs a backward
  // Backward only. grad_y.data and grad_final_state may be null (no gradient from there), and what is not asked for.
  Rows grad_y, grad_u, grad_delta, grad_z;
  const void* grad_final_state;
  void *grad_A, *grad_B, *grad_C, *grad_D, *grad_bias, *grad_initial_state;
};

// Aligned memory that throws when there is none.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, std::max<size_t>(bytes, 64)));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;  // a compiler without OpenMP: every loop runs on one thread
#endif
}

// work(thread, task) for every task. One thread goes without OpenMP: its threads do not survive a fork, and asking for
// them in the child would hang.
template <class Work> void run_tasks(int64_t threads, int64_t tasks, Work work) {
  if (threads <= 1 || tasks <= 1) {
    const FlushDenormals flush;
    for (int64_t task = 0; task < tasks; task++) work(0, task);
    return;
  }
#pragma omp parallel num_threads(int(std::min(threads, tasks)))
  {
    const FlushDenormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) work(thread_number(), task);
  }
}

// Sizes of a call, and its A in the order in which the loops read it.
template <class T> struct ScanPlan {
  typedef Vector<T> V;
  static constexpr int W = kLanes<T>;

  const ScanCall& call;
  const int64_t blocks, tiles;
  const int state, padded;  // states; rounded up to whole groups
  Buffer<V> rates;          // [blocks, padded]: A * log2(e)
  Buffer<T> fastest, slowest;  // [blocks, padded]: the largest and the least |rate| of the block's lanes

  ScanPlan(const ScanCall& c, int group)
      : call(c),
        blocks((c.channels + W - 1) / W),
        tiles((c.length + kTile - 1) / kTile),
        state(int(c.state)),
        padded((int(c.state) + group - 1) / group * group),
        rates(blocks * padded),
        fastest(blocks * padded),
        slowest(blocks * padded) {
    const T* A = static_cast<const T*>(c.A);
    for (int64_t k = 0; k < blocks; k++) {
      for (int n = 0; n < padded; n++) {
        V rate{};
        T most = 0, least = n < state ? std::numeric_limits<T>::infinity() : T(0);
        if (n < state)
          for (int i = 0; i < lanes(k); i++) {
            rate[i] = A[(k * W + i) * state + n] * T(1.4426950408889634);
            most = std::max(most, std::abs(rate[i])), least = std::min(least, std::abs(rate[i]));
          }
        rates.get()[k * padded + n] = rate;
        fastest.get()[k * padded + n] = most;
        slowest.get()[k * padded + n] = least;
      }
    }
  }

  int lanes(int64_t block) const { return int(std::min<int64_t>(W, call.channels - block * W)); }
  int steps(int64_t tile) const { return int(std::min<int64_t>(kTile, call.length - tile * kTile)); }
  int64_t tasks() const { return call.batch * call.splits; }
  int64_t first_block(int64_t split) const { return blocks * split / call.splits; }

  // A state [batch, channels, state] to and from blocks [blocks of the range, padded]
  void read_state(const void* source, int64_t b, int64_t k0, int64_t k1, V* out) const {
    std::fill(out, out + (k1 - k0) * padded, V{});
    if (!source) return;
    for (int64_t k = k0; k < k1; k++) {
      const T* p = static_cast<const T*>(source) + (b * call.channels + k * W) * state;
      for (int i = 0; i < lanes(k); i++)
        for (int n = 0; n < state; n++) out[(k - k0) * padded + n][i] = p[i * state + n];
    }
  }
  void write_state(void* target, int64_t b, int64_t k0, int64_t k1, const V* in) const {
    if (!target) return;
    for (int64_t k = k0; k < k1; k++) {
      T* p = static_cast<T*>(target) + (b * call.channels + k * W) * state;
      for (int i = 0; i < lanes(k); i++)
        for (int n = 0; n < state; n++) p[i * state + n] = in[(k - k0) * padded + n][i];
    }
  }
  T* tile_state(int64_t b, int64_t tile, int64_t block) const {
    return static_cast<T*>(call.tile_states) + (b * tiles + tile) * state * call.channels + block * W;
  }
  // A parameter [channels], 0 when absent
  V parameter(const void* source, int64_t block) const {
    return source ? load<T>(static_cast<const T*>(source) + block * W, lanes(block)) : V{};
  }
  // The tile's resets as contiguous bytes, or null when none is set
  const uint8_t* resets(int64_t b, int64_t t, int steps, uint8_t* out) const {
    if (!call.reset) return nullptr;
    uint8_t any = 0;
    const uint8_t* p = call.reset + b * call.reset_batch_stride + t * call.reset_row_stride;
    for (int i = 0; i < steps; i++) any |= out[i] = p[i * call.reset_row_stride];
    return any ? out : nullptr;
  }
};

// Step sizes of a tile, and the derivative of the softplus when `slopes` is given.
template <class T>
EHRSEQ_INLINE void step_sizes(const ScanPlan<T>& plan, int64_t b, int64_t t, int64_t k, int steps, Vector<T>* d, Vector<T>* slopes) {
  typedef Vector<T> V;
  load_tile<T>(plan.call.delta, b, t, k * kLanes<T>, steps, plan.lanes(k), d);
  const V bias = plan.parameter(plan.call.delta_bias, k);
  for (int i = 0; i < steps; i++) {
    V value = d[i] + bias, slope = splat(T(1));
    if (plan.call.softplus) softplus<T>(value, value, slope);
    d[i] = value;
    if (slopes) slopes[i] = slope;
  }
}

// In double nothing is slow.
template <class T> constexpr bool kHasSlow = sizeof(T) == 4;

template <class V> EHRSEQ_INLINE V magnitude(V x) { return x < V{} ? -x : x; }

// The longest |step size| of a tile: in each lane, in all of them, and in the lane where it is shortest.
template <class T> struct LongestSteps {
  Vector<T> lanes{};
  T most = 0, least = std::numeric_limits<T>::infinity();

  LongestSteps(const Vector<T>* d, int steps, int real_lanes) {
    if constexpr (!kHasSlow<T>) return;
    for (int i = 0; i < steps; i++) {
      const Vector<T> size = magnitude(d[i]);
      lanes = size > lanes ? size : lanes;
    }
    for (int i = 0; i < real_lanes; i++) most = std::max(most, lanes[i]), least = std::min(least, lanes[i]);
  }
  // The lanes of `value` in which a state of these rates is slow, 0 in the others
  EHRSEQ_INLINE Vector<T> slow_lanes(Vector<T> rates, Vector<T> value) const {
    return lanes * magnitude(rates) <= splat(T(kSmallExponent)) ? value : Vector<T>{};
  }
};

// Of a group of states: a bit for each that is slow in all its lanes; whether the slow lanes of any need the long form.
struct SlowStates {
  unsigned all_lanes = 0;
  bool any = false;
};
template <class T, int G>
EHRSEQ_INLINE SlowStates slow_states(const LongestSteps<T>& longest, const T* fastest, const T* slowest) {
  SlowStates slow;
  if constexpr (kHasSlow<T>) {
    for (int n = 0; n < G; n++) {
      slow.all_lanes |= unsigned(longest.most * fastest[n] <= T(kSmallExponent)) << n;
      slow.any |= longest.least * slowest[n] <= T(kLongMemoryExponent);
    }
    slow.any |= slow.all_lanes != 0;
  }
  return slow;
}

}  // namespace ehrseq
