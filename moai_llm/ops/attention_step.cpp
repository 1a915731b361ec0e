// One position of an attention mixer for a batch of sequences of different lengths, for the CPU it is compiled on.
//
// The contract and the readable reference are in attention_step.py, the Python side in attention_step_native.py. The
// products read each weight once for all rows; the keys of a sequence are read by all heads that share them at once.
// Between the pieces nothing is rounded, but what the cache holds.

#include "native.h"

#include <algorithm>
#include <new>

using namespace moai;

namespace {

struct Shape {
    idx batch, width, heads, shared, size, rotated, capacity, window;  // shared: heads of keys; window: 0 is all
    idx group() const { return heads / shared; }
};

template <class T>
struct Weights {
    const T *q, *k, *v, *out, *q_bias, *k_bias, *v_bias, *out_bias, *q_norm, *k_norm;
    float eps;
};

// The two halves of the first `rotated` dimensions form the pairs.
void rotate(float* head, idx rotated, const float* cos, const float* sin) {
    const idx half = rotated / 2;
    for (idx i = 0; i < half; i += W) {
        const int lanes = int(std::min<idx>(W, half - i));
        const vec a = load(head + i, lanes), b = load(head + half + i, lanes);
        const vec c = load(cos + i, lanes), s = load(sin + i, lanes);
        store(head + i, a * c - b * s, lanes);
        store(head + half + i, b * c + a * s, lanes);
    }
}

// y += weight * x
template <class T>
void add_scaled(float* y, const T* x, float weight, idx count) {
    for (idx i = 0; i < count; i += W) {
        const int lanes = int(std::min<idx>(W, count - i));
        store(y + i, load(y + i, lanes) + weight * load(x + i, lanes), lanes);
    }
}

// The heads of one group over the positions [first, last) of one sequence; q (group, size) becomes the mixed values.
template <class T>
void attend(const Shape& s, float* q, const T* keys, const T* values, idx first, idx last, float* scores) {
    const idx count = last - first;
    const float scale = LOG2E / std::sqrt(float(s.size));
    for (idx t = 0; t < count; t++)
        for (idx g = 0; g < s.group(); g++)
            scores[g * count + t] = scale * dot(q + g * s.size, keys + (first + t) * s.size, s.size);
    for (idx g = 0; g < s.group(); g++) {
        float *row = scores + g * count, highest = *std::max_element(row, row + count);
        vec total = {};
        for (idx t = 0; t < count; t += W) {
            const int lanes = int(std::min<idx>(W, count - t));
            store(row + t, exp2(at_least(load(row + t, lanes) - highest, -1e4f)), lanes);
            total += load(row + t, lanes);  // what is past the end is loaded as zero
        }
        const float inverse = 1.f / sum_lanes(total);
        for (idx t = 0; t < count; t++) row[t] *= inverse;
    }
    std::fill(q, q + s.group() * s.size, 0.f);
    for (idx t = 0; t < count; t++)
        for (idx g = 0; g < s.group(); g++)
            add_scaled(q + g * s.size, values + (first + t) * s.size, scores[g * count + t], s.size);
}

template <class T>
int step(const Shape& s, int threads, const T* input, const float* cos, const float* sin, T* keys, T* values,
         const idx* lengths, const Weights<T>& w, T* output) try {
    const idx B = s.batch, wide = s.heads * s.size, narrow = s.shared * s.size;
    const std::unique_ptr<float[]> floats(new float[B * (s.width + wide + 2 * narrow)]);
    float *x = floats.get(), *q = x + B * s.width, *k = q + B * wide, *v = k + B * narrow;
    convert(input, B * s.width, x);
    matvec(B, s.width, wide, threads, x, w.q, w.q_bias, q);
    matvec(B, s.width, narrow, threads, x, w.k, w.k_bias, k);
    matvec(B, s.width, narrow, threads, x, w.v, w.v_bias, v);
    const idx row = s.capacity * s.size;  // of one head in the cache
    idx seen = 0;
    for (idx b = 0; b < B; b++) {
        const float *c = cos ? cos + b * (s.rotated / 2) : nullptr, *n = sin ? sin + b * (s.rotated / 2) : nullptr;
        for (idx h = 0; h < s.heads + s.shared; h++) {
            const bool query = h < s.heads;
            float* head = query ? q + (b * s.heads + h) * s.size : k + (b * s.shared + h - s.heads) * s.size;
            if (w.q_norm) normalise(head, s.size, query ? w.q_norm : w.k_norm, w.eps);
            if (c) rotate(head, s.rotated, c, n);
        }
        for (idx h = 0; h < s.shared; h++) {
            const idx place = (b * s.shared + h) * row + lengths[b] * s.size;
            convert(k + (b * s.shared + h) * s.size, s.size, keys + place);
            convert(v + (b * s.shared + h) * s.size, s.size, values + place);
        }
        const idx last = lengths[b] + 1;
        seen = std::max(seen, s.window ? std::min(last, s.window) : last);
    }
    const idx tasks = B * s.shared;
    const int team_size = worth_waking(threads, 2 * tasks * seen * s.size * s.group());
    const std::unique_ptr<float[]> scores(new float[idx(team_size) * s.group() * seen]);
    parallel(team_size, tasks, [&](idx task, int worker) {
        const idx last = lengths[task / s.shared] + 1, first = s.window ? std::max<idx>(0, last - s.window) : 0;
        attend(s, q + task * s.group() * s.size, keys + task * row, values + task * row, first, last,
               scores.get() + worker * s.group() * seen);
    });
    matvec(B, wide, s.width, threads, q, w.out, w.out_bias, output);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

#define STEP(NAME, T)                                                                                                  \
    int NAME(idx batch, idx width, idx heads, idx shared, idx size, idx rotated, idx capacity, idx window, int threads, \
             float eps, const T* x, const float* cos, const float* sin, T* keys, T* values, const idx* lengths,         \
             const T* q, const T* k, const T* v, const T* out, const T* q_bias, const T* k_bias, const T* v_bias,       \
             const T* out_bias, const T* q_norm, const T* k_norm, T* y) {                                               \
        const Weights<T> w{q, k, v, out, q_bias, k_bias, v_bias, out_bias, q_norm, k_norm, eps};                        \
        const Shape s{batch, width, heads, shared, size, rotated, capacity, window};                                    \
        return step(s, threads, x, cos, sin, keys, values, lengths, w, y);                                              \
    }

extern "C" {
STEP(moai_attention_step_fp32, float)
STEP(moai_attention_step_bf16, bf16)
}
