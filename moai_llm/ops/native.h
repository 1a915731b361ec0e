// What the C++ kernels of this folder share: vectors as wide as the machine's, 2^x, and the threads of torch.
//
// Plain C++17 with the vector extensions of GCC and Clang, no torch and no Python: a compiler is all it takes to build.
// Built and loaded by native.py.

#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moai {

using idx = int64_t;
using bf16 = uint16_t;  // only its bits: no sum is ever made in it

// ---------------------------------------------------------------- vectors

// A vector wider than the registers is lowered through memory, several times slower: take the width the machine has.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint32_t bits __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));

inline vec splat(float x) { return vec{} + x; }
inline vec at_most(vec v, float limit) { return v > limit ? splat(limit) : v; }
inline vec at_least(vec v, float limit) { return v < limit ? splat(limit) : v; }

// The first `count` lanes, the others zero. A full vector is one instruction.
template <class V, class T>
inline V load_lanes(const T* p, int count) {
    V v = {};
    if (count == W)
        std::memcpy(&v, p, sizeof v);
    else
        for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
}

template <class V, class T>
inline void store_lanes(T* p, V v, int count) {
    if (count == W)
        std::memcpy(p, &v, sizeof v);
    else
        for (int i = 0; i < count; i++) p[i] = v[i];
}

inline vec load(const float* p, int count = W) { return load_lanes<vec>(p, count); }
inline vec load(const bf16* p, int count = W) {
    return (vec)(__builtin_convertvector(load_lanes<halves>(p, count), bits) << 16);
}

inline void store(float* p, vec v, int count = W) { store_lanes(p, v, count); }
inline void store(bf16* p, vec v, int count = W) {
    bits u = (bits)v;
    u += 0x7fff + ((u >> 16) & 1);          // to the nearest, ties to even
    u = v == v ? u : bits{} + 0x7fc00000u;  // rounding could carry a NaN over into a number
    store_lanes(p, __builtin_convertvector(u >> 16, halves), count);
}

template <class From, class To>
void convert(const From* p, idx count, To* out) {
    for (idx i = 0; i < count; i += W) {
        const int lanes = count - i < W ? int(count - i) : W;
        store(out + i, load(p + i, lanes), lanes);
    }
}

inline float sum_lanes(vec v) {  // by halving
    float part[W];
    std::memcpy(part, &v, sizeof v);
#pragma GCC unroll 4
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

// x . w, in fp32. Four sums in flight hide the latency of an addition.
template <class T>
float dot(const float* x, const T* w, idx count) {
    vec a = {}, b = {}, c = {}, d = {};
    idx i = 0;
    for (; i + 4 * W <= count; i += 4 * W) {
        a += load(x + i) * load(w + i);
        b += load(x + i + W) * load(w + i + W);
        c += load(x + i + 2 * W) * load(w + i + 2 * W);
        d += load(x + i + 3 * W) * load(w + i + 3 * W);
    }
    for (; i < count; i += W) {
        const int lanes = count - i < W ? int(count - i) : W;
        a += load(x + i, lanes) * load(w + i, lanes);
    }
    return sum_lanes((a + b) + (c + d));
}

template <class T>
T rounded(float value) {
    T out[1];
    store(out, splat(value), 1);
    return out[0];
}

// 2^x with a relative error below 2e-7, and 0 far below the range of a float: 2^round(x) times a polynomial of the rest
// (minimax on [-1/2, 1/2], and exactly 1 at 0: decays near 1 are what a long memory is made of).
inline vec exp2(vec x) {
#if defined(__AVX512F__)
    const vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vec f = x - whole;
#else
    const vec inside = at_most(at_least(x, -126), 127);
    const vec shifted = inside + 12582912.f;  // 1.5 * 2^23: the sum has no room for a fraction, so it is rounded
    const vec f = inside - (shifted - 12582912.f);
#endif
    vec p = splat(1.3264727e-3f);
    p = p * f + 9.6715130e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314700e-1f;
    p = p * f + 1.f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    const ints scaled = (ints)p + ((ints)shifted << 23);
    return (vec)(x < -126 ? ints{} : scaled);
#endif
}

// exp(-|x|) of a large |x| is 0 in fp32; past this nothing changes, and 2^x stays defined
constexpr float LOG2E = 1.44269504f;
inline vec silu(vec x) { return x / (1.f + exp2(at_most(x * -LOG2E, 126.f))); }

// x (rows of `count`) over its root mean square, times a weight, in place.
template <class T>
void normalise(float* x, idx count, const T* weight, float eps) {
    const float inverse = 1.f / std::sqrt(dot(x, x, count) / float(count) + eps);
    for (idx i = 0; i < count; i++) x[i] *= inverse * load(weight + i, 1)[0];
}

// ---------------------------------------------------------------- threads

// GOMP_parallel of the OpenMP runtime that torch has loaded. To ask it for a team by address, and not to compile with
// -fopenmp, keeps one runtime and one pool of threads in the process, whichever compiler builds this.
using Team = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
static Team team = nullptr;

// run(task, worker) for each task, worker < threads. Which worker takes which task is open: no result may depend on it.
template <class Run>
void parallel(int threads, idx tasks, const Run& run) {
    if (threads < 2 || tasks < 2 || !team) {
        for (idx task = 0; task < tasks; task++) run(task, 0);
        return;
    }
    struct Job {
        const Run& run;
        const idx tasks;
        std::atomic<idx> next{0};
        std::atomic<int> workers{0};
    } job{run, tasks};
    const auto work = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        const int worker = job.workers.fetch_add(1);
        for (idx task; (task = job.next.fetch_add(1)) < job.tasks;) job.run(task, worker);
    };
    team(work, &job, unsigned(threads), 0);  // of the size that torch itself asks for: another would restart threads
}

// All threads, or the calling one alone where to wake the others takes longer than to read so little. Never some of them:
// a team of another size than torch's restarts threads.
inline int worth_waking(int threads, idx bytes) { return bytes < 2 * 1024 * 1024 ? 1 : threads; }

// x . w in one sum, as `tile` makes it.
template <class T>
inline float in_order(const float* x, const T* w, idx in) {
    vec sum = {};
    idx i = 0;
    for (; i + W <= in; i += W) sum += load(x + i) * load(w + i);
    if (i < in) sum += load(x + i, int(in - i)) * load(w + i, int(in - i));
    return sum_lanes(sum);
}

// R rows of x against 4 rows of w, each sum on its own in the order of the columns: what is beside a row in a tile
// changes no bit of its result, so a batch gives each of its rows what the row gets alone. Written out, because an array
// of sums would lie in memory and not in registers.
template <int R, class T>
inline void tile(const float* x, const T* w, idx in, float* y, idx stride, const float* start) {
    const float *x1 = x + (R > 1 ? in : 0), *x2 = x + (R > 2 ? 2 * in : 0);
    const T *w1 = w + in, *w2 = w1 + in, *w3 = w2 + in;
    vec a0 = {}, a1 = {}, a2 = {}, a3 = {}, b0 = {}, b1 = {}, b2 = {}, b3 = {}, c0 = {}, c1 = {}, c2 = {}, c3 = {};
#define MOAI_TILE(i, lanes)                                                                                            \
    {                                                                                                                  \
        const vec k0 = load(w + (i), lanes), k1 = load(w1 + (i), lanes);                                               \
        const vec k2 = load(w2 + (i), lanes), k3 = load(w3 + (i), lanes);                                              \
        const vec row = load(x + (i), lanes);                                                                          \
        a0 += row * k0, a1 += row * k1, a2 += row * k2, a3 += row * k3;                                                \
        if (R > 1) {                                                                                                   \
            const vec row1 = load(x1 + (i), lanes);                                                                    \
            b0 += row1 * k0, b1 += row1 * k1, b2 += row1 * k2, b3 += row1 * k3;                                        \
        }                                                                                                              \
        if (R > 2) {                                                                                                   \
            const vec row2 = load(x2 + (i), lanes);                                                                    \
            c0 += row2 * k0, c1 += row2 * k1, c2 += row2 * k2, c3 += row2 * k3;                                        \
        }                                                                                                              \
    }
    idx i = 0;
    for (; i + W <= in; i += W) MOAI_TILE(i, W)
    if (i < in) MOAI_TILE(i, int(in - i))
#undef MOAI_TILE
    const auto put = [&](float* row, vec s0, vec s1, vec s2, vec s3) {
        row[0] = start[0] + sum_lanes(s0);
        row[1] = start[1] + sum_lanes(s1);
        row[2] = start[2] + sum_lanes(s2);
        row[3] = start[3] + sum_lanes(s3);
    };
    put(y, a0, a1, a2, a3);
    if (R > 1) put(y + stride, b0, b1, b2, b3);
    if (R > 2) put(y + 2 * stride, c0, c1, c2, c3);
}

// `out` rows of w for all rows of x; y (rows, stride).
template <class T>
inline void matvec_piece(idx rows, idx in, idx out, const float* x, const T* w, const T* bias, float* y, idx stride) {
    constexpr int O = 4;
    float start[O];
    for (idx o = 0; o < out; o += O) {
        const int width = out - o < O ? int(out - o) : O;
        for (int i = 0; i < O; i++) start[i] = bias && i < width ? load(bias + o + i, 1)[0] : 0.f;
        const T* weights = w + o * in;
        idx r = 0;
        if (width == O) {
            for (; r + 3 <= rows; r += 3) tile<3>(x + r * in, weights, in, y + r * stride + o, stride, start);
            if (rows - r == 2) tile<2>(x + r * in, weights, in, y + r * stride + o, stride, start);
            if (rows - r == 1) tile<1>(x + r * in, weights, in, y + r * stride + o, stride, start);
        } else {
            for (; r < rows; r++)
                for (int i = 0; i < width; i++) y[r * stride + o + i] = start[i] + in_order(x + r * in, weights + i * in, in);
        }
    }
}

constexpr idx TASK_BYTES = 64 * 1024;  // weights a thread takes at a time

// y (rows, out) = x (rows, in) W^T + bias. Each weight is read once, for all rows.
template <class T, class Y>
void matvec(idx rows, idx in, idx out, int threads, const float* x, const T* w, const T* bias, Y* y) {
    const idx each = (TASK_BYTES / idx(in * sizeof(T)) + 4) / 4 * 4;
    const std::unique_ptr<float[]> wide(std::is_same<Y, float>::value ? nullptr : new float[rows * out]);
    float* result = wide ? wide.get() : reinterpret_cast<float*>(y);
    parallel(worth_waking(threads, out * in * idx(sizeof(T))), (out + each - 1) / each, [&](idx task, int) {
        const idx first = task * each, count = out - first < each ? out - first : each;
        matvec_piece(rows, in, count, x, w + first * in, bias ? bias + first : nullptr, result + first, out);
    });
    if (wide) convert(wide.get(), rows * out, y);
}

// Aligned memory for each worker, taken before they start: an exception must not leave a thread.
class Scratch {
  public:
    Scratch(idx workers, idx vecs) : vecs_(vecs), memory_(new float[(workers * vecs + 1) * W]) {
        void* start = memory_.get();
        std::size_t room = (workers * vecs + 1) * sizeof(vec);
        base_ = static_cast<vec*>(std::align(sizeof(vec), workers * vecs * sizeof(vec), start, room));
    }
    vec* of(int worker) const { return base_ + vecs_ * worker; }

  private:
    idx vecs_;
    std::unique_ptr<float[]> memory_;
    vec* base_;
};

}  // namespace moai

// Defined here because a library is one source file and this header.
extern "C" void moai_use_team(void* gomp_parallel) { moai::team = reinterpret_cast<moai::Team>(gomp_parallel); }
