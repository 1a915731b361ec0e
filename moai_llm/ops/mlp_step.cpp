// Channel mixers at a few positions, for the CPU they are compiled on: the dense one, and chosen experts of a sparse one.
//
// The contracts and the readable references are in mlp_step.py, the Python side in mlp_step_native.py. Between the pieces
// nothing is rounded. Positions that chose the same expert share one pass over its weights.

#include "native.h"

#include <algorithm>
#include <new>

using namespace moai;

namespace {

enum Activation { SILU, GELU, GELU_TANH, RELU };

// erf by 7.1.26 of Abramowitz and Stegun: an absolute error below 2e-7.
inline vec erf(vec x) {
    const vec size = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
    vec p = splat(1.061405429f);
    for (const float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + term;
    const vec y = 1.f - p * t * exp2(at_least(size * size * -LOG2E, -1e4f));
    return x < 0.f ? -y : y;
}

inline vec activate(vec x, int kind) {
    switch (kind) {
        case SILU: return silu(x);
        case GELU: return 0.5f * x * (1.f + erf(x * 0.70710678f));
        case GELU_TANH: return silu(2.f * 0.79788456f * (x + 0.044715f * x * x * x)) /
                               (2.f * 0.79788456f * (1.f + 0.044715f * x * x));  // 1 + tanh(a) = 2 sigmoid(2 a)
        default: return at_least(x, 0.f);
    }
}

// h (rows, columns) = act(first half) * second half where gated, else act of all; the result lies in the first `inner`.
void activate_rows(float* h, idx rows, idx inner, bool gated, int kind) {
    const idx columns = gated ? 2 * inner : inner;
    for (idx r = 0; r < rows; r++)
        for (idx i = 0; i < inner; i += W) {
            const int lanes = int(std::min<idx>(W, inner - i));
            vec value = activate(load(h + r * columns + i, lanes), kind);
            if (gated) value *= load(h + r * columns + inner + i, lanes);
            store(h + r * inner + i, value, lanes);  // never past what is still to be read
        }
}

template <class T>
int dense(idx rows, idx width, idx inner, int kind, int threads, const T* input, const T* gate, const T* up,
          const T* down, const T* gate_bias, const T* up_bias, const T* down_bias, T* output) try {
    const std::unique_ptr<float[]> floats(new float[rows * (width + 2 * inner)]);
    float *x = floats.get(), *h = x + rows * width, *g = h + rows * inner;
    convert(input, rows * width, x);
    matvec(rows, width, inner, threads, x, up, up_bias, h);
    if (gate) matvec(rows, width, inner, threads, x, gate, gate_bias, g);
    for (idx i = 0; i < rows * inner; i += W) {
        const int lanes = int(std::min<idx>(W, rows * inner - i));
        const vec value = load(h + i, lanes);
        store(h + i, gate ? activate(load(g + i, lanes), kind) * value : activate(value, kind), lanes);
    }
    matvec(rows, inner, width, threads, h, down, down_bias, output);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// ids (rows, k) and weights (rows, k); up (E, inner or 2 inner, width), down (E, width, inner).
template <class T>
int experts(idx rows, idx width, idx inner, idx count, idx k, bool gated, int kind, int threads, const T* input,
            const idx* ids, const float* weights, const T* up, const T* down, const T* up_bias, const T* down_bias,
            T* output) try {
    const idx columns = gated ? 2 * inner : inner;
    const std::unique_ptr<float[]> floats(new float[rows * (3 * width + columns) + rows * k * width]);
    float *x = floats.get(), *some = x + rows * width, *h = some + rows * width, *y = h + rows * columns;
    float* parts = y + rows * width;  // (rows, k, width), summed at the end in the order of the choice
    const std::unique_ptr<idx[]> places(new idx[rows * k]);
    convert(input, rows * width, x);
    for (idx e = 0; e < count; e++) {
        idx found = 0;
        for (idx i = 0; i < rows * k; i++)
            if (ids[i] == e) places[found++] = i;
        if (!found) continue;
        for (idx i = 0; i < found; i++) std::copy_n(x + places[i] / k * width, width, some + i * width);
        matvec(found, width, columns, threads, some, up + e * columns * width, up_bias ? up_bias + e * columns : up_bias,
               h);
        activate_rows(h, found, inner, gated, kind);
        matvec(found, inner, width, threads, h, down + e * width * inner, down_bias ? down_bias + e * width : down_bias,
               y);
        for (idx i = 0; i < found; i++)
            for (idx c = 0; c < width; c++) parts[places[i] * width + c] = weights[places[i]] * y[i * width + c];
    }
    for (idx r = 0; r < rows; r++)
        for (idx c = 0; c < width; c += W) {
            const int lanes = int(std::min<idx>(W, width - c));
            vec sum = {};
            for (idx j = 0; j < k; j++) sum += load(parts + (r * k + j) * width + c, lanes);
            store(output + r * width + c, sum, lanes);
        }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

#define STEPS(DENSE, EXPERTS, T)                                                                                       \
    int DENSE(idx rows, idx width, idx inner, int kind, int threads, const T* x, const T* gate, const T* up,           \
              const T* down, const T* gate_bias, const T* up_bias, const T* down_bias, T* y) {                         \
        return dense(rows, width, inner, kind, threads, x, gate, up, down, gate_bias, up_bias, down_bias, y);          \
    }                                                                                                                  \
    int EXPERTS(idx rows, idx width, idx inner, idx count, idx k, int gated, int kind, int threads, const T* x,        \
                const idx* ids, const float* weights, const T* up, const T* down, const T* up_bias,                    \
                const T* down_bias, T* y) {                                                                            \
        return experts(rows, width, inner, count, k, gated != 0, kind, threads, x, ids, weights, up, down, up_bias,    \
                       down_bias, y);                                                                                  \
    }

extern "C" {
STEPS(moai_dense_step_fp32, moai_experts_step_fp32, float)
STEPS(moai_dense_step_bf16, moai_experts_step_bf16, bf16)
}
