// The library's plain C interface: one struct in, 0 or an error out. No libtorch, no Python: one build serves every
// version of both. Called from cpu_library.py.
#include "conv.h"
#include "forecast.h"
#include "scan_backward.h"
#include "scan_forward.h"
#include "scan_step.h"

#define EHRSEQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Goes up with every change of a struct or of its meaning; cpu_library.py refuses a library of another number.
constexpr int kAbiVersion = 2;
constexpr int kDone = 0, kOutOfMemory = 1, kFailed = 2;

// An exception must not leave through the C interface.
template <class F> int guarded(F f) {
  try {
    f();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (...) {
    return kFailed;
  }
}

// The group of states that wastes least of the registers: the largest whose padding adds nothing, or not more than a
// smaller one would.
template <class T, int G> void forward(const ehrseq::ScanCall& call) {
  if constexpr (G > 4) {
    const auto padded = [&](int64_t group) { return (call.state + group - 1) / group * group; };
    if (padded(G) > padded(G / 2)) return forward<T, G / 2>(call);
  }
  if (call.length == 1 && !call.tile_states) return ehrseq::scan_step<T>(call);
  ehrseq::scan_forward<T, G>(call);
}
template <class T, int G> void backward(const ehrseq::ScanCall& call) {
  if constexpr (G > 4) {
    if (call.state <= G / 2) return backward<T, G / 2>(call);
  }
  ehrseq::scan_backward<T, G>(call);
}

}  // namespace

EHRSEQ_EXPORT int ehrseq_abi_version() { return kAbiVersion; }
EHRSEQ_EXPORT int ehrseq_tile() { return ehrseq::kTile; }
EHRSEQ_EXPORT int ehrseq_vector_bytes() { return ehrseq::kVectorBytes; }
EHRSEQ_EXPORT const char* ehrseq_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

EHRSEQ_EXPORT int ehrseq_scan_forward(const ehrseq::ScanCall* call) {
  return guarded([&] {
    call->is_double ? forward<double, ehrseq::kForwardStates>(*call) : forward<float, ehrseq::kForwardStates>(*call);
  });
}
EHRSEQ_EXPORT int ehrseq_scan_backward(const ehrseq::ScanCall* call) {
  return guarded([&] {
    call->is_double ? backward<double, ehrseq::kBackwardStates>(*call) : backward<float, ehrseq::kBackwardStates>(*call);
  });
}
EHRSEQ_EXPORT int ehrseq_conv_forward(const ehrseq::ConvCall* call) {
  return guarded([&] { call->is_double ? ehrseq::conv_forward<double>(*call) : ehrseq::conv_forward<float>(*call); });
}
EHRSEQ_EXPORT int ehrseq_conv_backward(const ehrseq::ConvCall* call) {
  return guarded([&] { call->is_double ? ehrseq::conv_backward<double>(*call) : ehrseq::conv_backward<float>(*call); });
}
EHRSEQ_EXPORT int ehrseq_model_step(const ehrseq::StepCall* call) {
  return guarded([&] { ehrseq::model_step(*call); });
}
EHRSEQ_EXPORT int ehrseq_forecast_step(const ehrseq::ForecastCall* call) {
  return guarded([&] { ehrseq::forecast_step(*call); });
}
EHRSEQ_EXPORT int ehrseq_forecast_draw(const ehrseq::DrawCall* call) {
  return guarded([&] { ehrseq::forecast_draw(*call); });
}
