// y = x W^T + bias for a few rows of x: each weight is read once, at the speed of the memory, by all threads.
//
// Decoding is made of these. A matrix product written for many rows leaves most of the memory's speed unused here, above
// all in bfloat16. Built and loaded by native.py.

#include "native.h"

#include <new>

using namespace moai;

namespace {

constexpr idx TASK_BYTES = 64 * 1024;  // weights a thread takes at a time

template <class T>
int linear(idx rows, idx in, idx out, int threads, const T* x, const T* w, const T* bias, T* y) try {
    const std::unique_ptr<float[]> wide(new float[rows * in]);
    convert(x, rows * in, wide.get());
    threads = worth_waking(threads, out * in * idx(sizeof(T)));
    const idx each = TASK_BYTES / idx(in * sizeof(T)) + 1;
    parallel(threads, (out + each - 1) / each, [&](idx task, int) {
        const idx stop = (task + 1) * each < out ? (task + 1) * each : out;
        for (idx o = task * each; o < stop; o++) {
            const float start = bias ? load(bias + o, 1)[0] : 0.f;
            for (idx r = 0; r < rows; r++) y[r * out + o] = rounded<T>(start + dot(wide.get() + r * in, w + o * in, in));
        }
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

extern "C" {

int moai_linear_fp32(idx rows, idx in, idx out, int threads, const float* x, const float* w, const float* bias, float* y) {
    return linear(rows, in, out, threads, x, w, bias, y);
}

int moai_linear_bf16(idx rows, idx in, idx out, int threads, const bf16* x, const bf16* w, const bf16* bias, bf16* y) {
    return linear(rows, in, out, threads, x, w, bias, y);
}
}
