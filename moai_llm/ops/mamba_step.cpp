// One position of a Mamba-1 mixer for the CPU it is compiled on.
//
// The contract and the readable reference are in mamba_step.py, the Python side in mamba_step_native.py. Between the
// pieces nothing is rounded: what flows between them is fp32 whatever the type of the weights.

#include "native.h"

#include <algorithm>
#include <cmath>
#include <new>

using namespace moai;

namespace {

constexpr idx PIECE = 256;  // channels a task

// max(x, 0) + log(1 + e) with e = exp(-|x|), by the series of 2 artanh(e / (2 + e)), whose argument is at most 1/3.
inline vec softplus(vec x) {
    const vec positive = at_least(x, 0.f), e = exp2(at_least(x - 2.f * positive, -80.f) * LOG2E), s = e / (2.f + e);
    const vec t = s * s;
    vec p = splat(1.f / 13);
    for (const float term : {1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3, 1.f}) p = p * t + term;
    return positive + 2.f * s * p;
}

struct Shape {
    idx batch, width, channels, states, rank, kernel;
    idx projected() const { return rank + 2 * states; }
};

template <class T>
struct Weights {
    const T *in_x, *in_z, *conv, *conv_bias, *x_proj, *dt_proj, *out, *norms[3];
    const float *dt_bias, *A_log, *D;
    float eps;
};

// Move the window on by one position and convolve it: state (D, K) gets x (D,) at its end, x = silu(bias + state . w).
template <class T>
void convolve(const Shape& s, const Weights<T>& w, idx first, idx count, T* state, float* x) {
    for (idx d = first; d < first + count; d++) {
        T* window = state + d * s.kernel;
        float sum = w.conv_bias ? load(w.conv_bias + d, 1)[0] : 0.f;
        for (idx k = 0; k + 1 < s.kernel; k++) window[k] = window[k + 1];
        window[s.kernel - 1] = rounded<T>(x[d]);
        for (idx k = 0; k < s.kernel; k++) sum += load(window + k, 1)[0] * load(w.conv + d * s.kernel + k, 1)[0];
        x[d] = sum;
    }
    for (idx d = first; d < first + count; d += W) {
        const int lanes = int(std::min<idx>(W, first + count - d));
        store(x + d, silu(load(x + d, lanes)), lanes);
    }
}

// Recurrence, skip and gate of some channels. The lanes are the states of one channel, as they lie in memory.
template <class T>
void advance(const Shape& s, const Weights<T>& w, idx first, idx count, const float* x, const float* projected,
             float* state, float* z) {  // z becomes y
    const float *B = projected + s.rank, *C = B + s.states;
    float out[PIECE], delta[PIECE];
    for (idx i = 0; i < count; i++)
        delta[i] = dot(projected, w.dt_proj + (first + i) * s.rank, s.rank) + w.dt_bias[first + i];
    for (idx i = 0; i < count; i += W) {
        const int lanes = int(std::min<idx>(W, count - i));
        store(delta + i, softplus(load(delta + i, lanes)), lanes);
    }
    for (idx i = 0; i < count; i++) {
        const idx d = first + i;
        const vec step = splat(-delta[i] * LOG2E), dx = splat(delta[i] * x[d]);
        const float* A_log = w.A_log + d * s.states;
        float* h = state + d * s.states;
        vec sum = {};
        for (idx n = 0; n < s.states; n += W) {
            const int lanes = int(std::min<idx>(W, s.states - n));
            const vec rate = exp2(at_most(load(A_log + n, lanes) * LOG2E, 60.f));
            const vec next = exp2(at_least(rate * step, -1e4f)) * load(h + n, lanes) + dx * load(B + n, lanes);
            store(h + n, next, lanes);
            sum += next * load(C + n, lanes);
        }
        out[i] = sum_lanes(sum) + w.D[d] * x[d];
    }
    for (idx i = 0; i < count; i += W) {
        const int lanes = int(std::min<idx>(W, count - i));
        store(z + first + i, load(out + i, lanes) * silu(load(z + first + i, lanes)), lanes);
    }
}

template <class T>
int step(const Shape& s, int threads, const T* input, T* window, float* state, const Weights<T>& w, T* output) try {
    const idx pieces = (s.channels + PIECE - 1) / PIECE, columns = s.projected(), B = s.batch;
    const std::unique_ptr<float[]> floats(new float[B * (s.width + 2 * s.channels + columns)]);
    float *wide = floats.get(), *x = wide + B * s.width, *z = x + B * s.channels, *projected = z + B * s.channels;
    const int team_size = worth_waking(threads, s.channels * s.rank * idx(sizeof(T)));
    const auto over_channels = [&](const auto& run) {
        parallel(team_size, B * pieces, [&](idx task, int) {
            const idx b = task / pieces, first = task % pieces * PIECE;
            run(b, first, std::min<idx>(PIECE, s.channels - first));
        });
    };
    convert(input, B * s.width, wide);
    matvec(B, s.width, s.channels, threads, wide, w.in_x, (const T*)nullptr, x);
    matvec(B, s.width, s.channels, threads, wide, w.in_z, (const T*)nullptr, z);
    over_channels([&](idx b, idx first, idx count) {
        const idx at = b * s.channels;
        convolve(s, w, first, count, window + at * s.kernel, x + at);
    });
    matvec(B, s.channels, columns, threads, x, w.x_proj, (const T*)nullptr, projected);
    const idx sizes[] = {s.rank, s.states, s.states};
    for (idx b = 0; w.norms[0] && b < B; b++) {
        float* part = projected + b * columns;
        for (int i = 0; i < 3; part += sizes[i++]) normalise(part, sizes[i], w.norms[i], w.eps);
    }
    over_channels([&](idx b, idx first, idx count) {
        const idx at = b * s.channels;
        advance(s, w, first, count, x + at, projected + b * columns, state + at * s.states, z + at);
    });
    matvec(B, s.channels, s.width, threads, z, w.out, (const T*)nullptr, output);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

#define STEP(NAME, T)                                                                                                  \
    int NAME(idx batch, idx width, idx channels, idx states, idx rank, idx kernel, int threads, float eps, const T* x,  \
             T* window, float* state, const T* in_x, const T* in_z, const T* conv, const T* conv_bias, const T* x_proj, \
             const T* dt_proj, const float* dt_bias, const float* A_log, const float* D, const T* out,                  \
             const T* dt_norm, const T* B_norm, const T* C_norm, T* y) {                                                \
        const Weights<T> w{in_x, in_z,    conv,  conv_bias, x_proj, dt_proj, out, {dt_norm, B_norm, C_norm},            \
                           dt_bias, A_log, D, eps};                                                                     \
        return step(Shape{batch, width, channels, states, rank, kernel}, threads, x, window, state, w, y);              \
    }

extern "C" {
STEP(moai_mamba_step_fp32, float)
STEP(moai_mamba_step_bf16, bf16)
}
