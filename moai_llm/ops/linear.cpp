// y = x W^T + bias for a few rows of x: each weight is read once, at the speed of the memory, by all threads.
//
// Decoding is made of these. A matrix product written for many rows leaves most of the memory's speed unused here, above
// all in bfloat16. Built and loaded by native.py.

#include "native.h"

#include <new>

using namespace moai;

namespace {

template <class T>
int linear(idx rows, idx in, idx out, int threads, const T* x, const T* w, const T* bias, T* y) try {
    const std::unique_ptr<float[]> wide(new float[rows * in]);
    convert(x, rows * in, wide.get());
    matvec(rows, in, out, threads, wide.get(), w, bias, y);
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
