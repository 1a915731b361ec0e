// The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2) for the CPU it is compiled on, and its single step.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t
//
// The Python side is selective_scan_native.py; the contract and the readable reference are in selective_scan.py.
//
// A vector holds one state of W neighbouring channels, so the recurrence, y and the gradients of x and delta need no
// shuffles; only the gradients of B and C are summed across lanes, once a chunk. Rows are walked in chunks of K steps:
// the forward keeps the state before each chunk, the backward recomputes a chunk from it, so that all it works on stays
// in the caches. The N states are cut into groups of 8, 4 and 1 that live in registers: no N is special.
//
// Shapes: x, delta, y (B, L, D); A (D, N); B, C (B, L, N); states (B, D, N); starts (B, L); kept (chunks, B, N, D).

#include "native.h"

#include <algorithm>
#include <new>
#include <numeric>
#include <type_traits>

namespace {

using namespace moai;

// ---------------------------------------------------------------- how a problem is cut

constexpr int K = 32;            // steps a chunk
constexpr int MAX_GROUP = 8;     // states walked together: as many as fit in the registers, with their gradients
constexpr int MAX_BLOCKS = 32;   // blocks of W channels a task: its chunk stays in the second-level cache
constexpr idx SERIAL = 1 << 17;  // updates of a state below which waking the threads costs more than it saves

struct Shape {
    idx batch, length, channels, states;

    idx rows() const { return batch * length; }
    idx chunks() const { return (length + K - 1) / K; }
    idx blocks() const { return (channels + W - 1) / W; }
    int lanes(idx block) const { return int(std::min<idx>(W, channels - block * W)); }
    int steps(idx chunk) const { return int(std::min<idx>(K, length - chunk * K)); }
    bool small() const { return rows() * channels * states < SERIAL; }
};

// A task is one sequence of the batch and a range of channel blocks. There are as many for every thread, where there
// are blocks enough.
struct Tasks {
    idx splits, count, width;  // ranges a sequence, tasks, blocks of the widest range

    Tasks(const Shape& s, int threads) {
        const idx even = threads / std::gcd(s.batch, idx(threads));
        splits = even * ((s.blocks() + even * MAX_BLOCKS - 1) / (even * MAX_BLOCKS));
        splits = std::min(splits, s.blocks());
        count = s.batch * splits;
        width = (s.blocks() + splits - 1) / splits;
    }
    idx first(const Shape& s, idx split) const { return s.blocks() * split / splits; }
};

template <int G>
using Group = std::integral_constant<int, G>;

// run(first state, size of the group as a constant)
template <class Run>
void in_groups(idx states, const Run& run) {
    idx n = 0;
    for (; n + MAX_GROUP <= states; n += MAX_GROUP) run(n, Group<MAX_GROUP>{});
    for (; n + 4 <= states; n += 4) run(n, Group<4>{});
    for (; n < states; n++) run(n, Group<1>{});
}

// ---------------------------------------------------------------- a vector for each state, its lanes being channels

constexpr float LN2 = 0.69314718f;
constexpr float FAR = 1e18f;  // a step or a rate beyond it decays to 0 all the same; a product of two stays finite

void gather_states(const float* rows, idx states, int lanes, vec* out) {  // zero where there are no rows
    for (idx n = 0; n < states; n++) {
        out[n] = vec{};
        for (int i = 0; rows && i < lanes; i++) out[n][i] = rows[i * states + n];
    }
}

void scatter_states(const vec* in, idx states, int lanes, float* rows) {
    for (idx n = 0; n < states; n++)
        for (int i = 0; i < lanes; i++) rows[i * states + n] = in[n][i];
}

void gather_rates(const float* A, idx states, int lanes, vec* out) {  // of powers of two
    gather_states(A, states, lanes, out);
    for (idx n = 0; n < states; n++) out[n] = at_least(out[n] * LOG2E, -FAR);
}

const float* offset(const float* p, idx by) { return p ? p + by : nullptr; }

// ---------------------------------------------------------------- forward

struct Step {  // one step of one block of channels
    vec delta, dx, y;
};

// G states over a chunk: their state is read and written back, y is added to.
template <int G>
void scan_group(const vec* rate, vec* state, const float* B, const float* C, idx stride, const uint8_t* starts,
                int steps, Step* step) {
    vec h[G];
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) h[n] = state[n];
    for (int k = 0; k < steps; k++) {
        if (starts && starts[k]) std::fill_n(h, G, vec{});
        vec sum[2] = {step[k].y, vec{}};  // two, so that an addition need not wait for the one before
#pragma GCC unroll 8
        for (int n = 0; n < G; n++) {
            h[n] = exp2(step[k].delta * rate[n]) * h[n] + step[k].dx * B[k * stride + n];
            sum[n % 2] += h[n] * C[k * stride + n];
        }
        step[k].y = sum[0] + sum[1];
    }
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) state[n] = h[n];
}

template <class T>
void forward(const Shape& s, int threads, const T* x, const float* delta, const float* A, const T* B, const T* C,
             const float* D, const uint8_t* starts, const float* h0, T* y, float* last, float* kept) {
    const idx N = s.states;
    if (s.small()) threads = 1;
    const Tasks tasks(s, threads);
    constexpr idx STEP = sizeof(Step) / sizeof(vec);
    const Scratch scratch(threads, 2 * tasks.width * N + STEP * K + (2 * K * N + W - 1) / W);

    parallel(threads, tasks.count, [&](idx task, int worker) {
        const idx b = task / tasks.splits, split = task % tasks.splits;
        const idx j0 = tasks.first(s, split), j1 = tasks.first(s, split + 1);
        vec *rates = scratch.of(worker), *states = rates + tasks.width * N;
        Step* step = reinterpret_cast<Step*>(states + tasks.width * N);
        float *B_k = reinterpret_cast<float*>(step + K), *C_k = B_k + K * N;

        for (idx j = j0; j < j1; j++) {
            gather_rates(A + j * W * N, N, s.lanes(j), rates + (j - j0) * N);
            gather_states(offset(h0, (b * s.channels + j * W) * N), N, s.lanes(j), states + (j - j0) * N);
        }
        for (idx c = 0; c < s.chunks(); c++) {
            const idx row = b * s.length + c * K;
            const int steps = s.steps(c);
            convert(B + row * N, steps * N, B_k);
            convert(C + row * N, steps * N, C_k);
            for (idx j = j0; j < j1; j++) {
                const int lanes = s.lanes(j);
                const idx at = row * s.channels + j * W;
                const vec* rate = rates + (j - j0) * N;
                vec* h = states + (j - j0) * N;
                for (idx n = 0; kept && n < N; n++)
                    store(kept + ((c * s.batch + b) * N + n) * s.channels + j * W, h[n], lanes);
                const vec skip = load(D + j * W, lanes);
                for (int k = 0; k < steps; k++) {
                    const idx here = at + k * s.channels;
                    const vec d = load(delta + here, lanes), in = load(x + here, lanes);
                    step[k] = {at_most(d, FAR), d * in, skip * in};
                    // the next block: the rows lie too far apart for the processor to see it coming
                    __builtin_prefetch(delta + here + W);
                    __builtin_prefetch(x + here + W);
                    __builtin_prefetch(y + here + W, 1);
                }
                in_groups(N, [&](idx n, auto group) {
                    scan_group<group>(rate + n, h + n, B_k + n, C_k + n, N, starts ? starts + row : nullptr, steps,
                                      step);
                });
                for (int k = 0; k < steps; k++) store(y + at + k * s.channels, step[k].y, lanes);
            }
        }
        for (idx j = j0; j < j1; j++)
            scatter_states(states + (j - j0) * N, N, s.lanes(j), last + (b * s.channels + j * W) * N);
    });
}

// ---------------------------------------------------------------- backward

// What is walked together lies together, and not only for the caches: a load from one array and a store to another
// that is a multiple of 4096 bytes away look to the processor as if they met, and wait for each other. Separate arrays
// were half as fast whenever they happened to lie so.
struct BackStep {  // one step of one block of channels
    vec delta, dx, gy;
    vec by_B, by_rate;  // sums over the states of dL/dh_t B_t and of dL/d(delta_t A) A
};

template <int G>
struct BackRow {              // one step of G states
    vec before[G], decay[G];  // the state before it, and what is kept of that: of one block of channels
    vec gB[G], gC[G];         // summed over the blocks
};

template <int G>
void backward_group(const float* kept, idx channels, int lanes, const vec* rate, const float* B, const float* C,
                    idx stride, const uint8_t* starts, int steps, BackStep* step, BackRow<G>* row, vec* gstate,
                    vec* grate) {
    vec h[G];
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) row[0].before[n] = h[n] = load(kept + n * channels, lanes);
    for (int k = 0; k < steps; k++) {
        if (starts && starts[k]) std::fill_n(h, G, vec{});
#pragma GCC unroll 8
        for (int n = 0; n < G; n++) {
            const vec decay = exp2(step[k].delta * rate[n]);
            row[k].decay[n] = decay;
            row[k + 1].before[n] = h[n] = decay * h[n] + step[k].dx * B[k * stride + n];
        }
    }
    for (int k = 0; starts && k < steps; k++)  // nothing flows back over the border of a document
        if (starts[k]) std::fill_n(row[k].decay, G, vec{});

    vec gh[G], gA[G];
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) gh[n] = gstate[n], gA[n] = grate[n];
    for (int k = steps - 1; k >= 0; k--) {
        const vec gy = step[k].gy;
        vec by_B = step[k].by_B, by_rate = step[k].by_rate;
#pragma GCC unroll 8
        for (int n = 0; n < G; n++) {
            vec q = gh[n] + gy * C[k * stride + n];  // dL/dh_t
            row[k].gC[n] += gy * row[k + 1].before[n];
            row[k].gB[n] += q * step[k].dx;
            by_B += q * B[k * stride + n];
            gh[n] = q *= row[k].decay[n];
            q *= row[k].before[n];  // dL/d(delta_t A)
            by_rate += q * rate[n];
            gA[n] += q * step[k].delta;
        }
        step[k].by_B = by_B;
        step[k].by_rate = by_rate;
    }
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) gstate[n] = gh[n], grate[n] = gA[n];
}

// out[i] = the sum of parts[p][i] over p, in the order of p
template <class T>
void add_up(int threads, const float* parts, idx count, idx size, T* out) {
    constexpr idx PIECE = 4096;
    if (count * size < SERIAL) threads = 1;
    parallel(threads, (size + PIECE - 1) / PIECE, [&](idx piece, int) {
        const idx end = std::min(size, (piece + 1) * PIECE);
        for (idx i = piece * PIECE; i < end; i += W) {
            const int lanes = int(std::min<idx>(W, end - i));
            vec sum = {};
            for (idx p = 0; p < count; p++) sum += load(parts + p * size + i, lanes);
            store(out + i, sum, lanes);
        }
    });
}

template <class T>
void backward(const Shape& s, int threads, const T* gy, const float* glast, const T* x, const float* delta,
              const float* A, const T* B, const T* C, const float* D, const uint8_t* starts, const float* kept, T* gx,
              float* gdelta, float* gA, T* gB, T* gC, float* gD, float* gh0) {
    const idx N = s.states, rows = s.rows();
    if (s.small()) threads = 1;
    const Tasks tasks(s, threads);
    const idx width = tasks.width;
    constexpr idx ROW = sizeof(BackRow<MAX_GROUP>) / sizeof(vec), STEP = sizeof(BackStep) / sizeof(vec);
    const Scratch scratch(threads, width * (3 * N + 1 + STEP * K) + ROW * (K + 1) + (2 * K * N + W - 1) / W);
    // Every task writes its own share of the sums over channels (gB, gC) and over the batch (gA, gD). They are added up
    // in a fixed order at the end, so that two runs agree to the bit.
    const std::unique_ptr<float[]> shares(new float[2 * tasks.splits * rows * N + s.batch * s.channels * (N + 1)]);
    float *gB_share = shares.get(), *gC_share = gB_share + tasks.splits * rows * N;
    float *gA_share = gC_share + tasks.splits * rows * N, *gD_share = gA_share + s.batch * s.channels * N;

    parallel(threads, tasks.count, [&](idx task, int worker) {
        const idx b = task / tasks.splits, split = task % tasks.splits;
        const idx j0 = tasks.first(s, split), j1 = tasks.first(s, split + 1);
        vec *rates = scratch.of(worker), *gstates = rates + width * N, *grates = gstates + width * N;
        vec* gskips = grates + width * N;
        BackStep* packed = reinterpret_cast<BackStep*>(gskips + width);
        vec* row_memory = reinterpret_cast<vec*>(packed + width * K);
        float *B_k = reinterpret_cast<float*>(row_memory + ROW * (K + 1)), *C_k = B_k + K * N;

        std::fill_n(grates, width * N, vec{});
        std::fill_n(gskips, width, vec{});
        for (idx j = j0; j < j1; j++) {
            gather_rates(A + j * W * N, N, s.lanes(j), rates + (j - j0) * N);
            gather_states(offset(glast, (b * s.channels + j * W) * N), N, s.lanes(j), gstates + (j - j0) * N);
        }
        for (idx c = s.chunks() - 1; c >= 0; c--) {
            const idx row = b * s.length + c * K;
            const int steps = s.steps(c);
            convert(B + row * N, steps * N, B_k);
            convert(C + row * N, steps * N, C_k);
            for (idx j = j0; j < j1; j++) {
                const int lanes = s.lanes(j);
                BackStep* step = packed + (j - j0) * K;
                for (int k = 0; k < steps; k++) {
                    const idx at = (row + k) * s.channels + j * W;
                    const vec d = load(delta + at, lanes);
                    step[k] = {at_most(d, FAR), d * load(x + at, lanes), load(gy + at, lanes), vec{}, vec{}};
                    __builtin_prefetch(delta + at + W);
                    __builtin_prefetch(x + at + W);
                    __builtin_prefetch(gy + at + W);
                }
            }
            in_groups(N, [&](idx n, auto group) {
                constexpr int G = group;
                BackRow<G>* row_k = reinterpret_cast<BackRow<G>*>(row_memory);
                for (int k = 0; k < steps; k++) std::fill_n(row_k[k].gB, G, vec{}), std::fill_n(row_k[k].gC, G, vec{});
                for (idx j = j0; j < j1; j++) {
                    const idx i = (j - j0) * N + n;
                    backward_group<G>(kept + ((c * s.batch + b) * N + n) * s.channels + j * W, s.channels, s.lanes(j),
                                      rates + i, B_k + n, C_k + n, N, starts ? starts + row : nullptr, steps,
                                      packed + (j - j0) * K, row_k, gstates + i, grates + i);
                }
                for (int k = 0; k < steps; k++)
                    for (int i = 0; i < G; i++) {
                        const idx to = (split * rows + row + k) * N + n + i;
                        gB_share[to] = sum_lanes(row_k[k].gB[i]);
                        gC_share[to] = sum_lanes(row_k[k].gC[i]);
                    }
            });
            for (idx j = j0; j < j1; j++) {
                const int lanes = s.lanes(j);
                const idx at = row * s.channels + j * W;
                BackStep* step = packed + (j - j0) * K;
                const vec skip = load(D + j * W, lanes);
                // all loads, then all stores: rows are often a multiple of 4096 bytes long (see above)
                for (int k = 0; k < steps; k++) {
                    const vec d = load(delta + at + k * s.channels, lanes), in = load(x + at + k * s.channels, lanes);
                    gskips[j - j0] += step[k].gy * in;
                    step[k].by_rate = step[k].by_rate * LN2 + step[k].by_B * in;  // of delta
                    step[k].by_B = step[k].gy * skip + step[k].by_B * d;          // of x
                }
                for (int k = 0; k < steps; k++) {
                    store(gdelta + at + k * s.channels, step[k].by_rate, lanes);
                    store(gx + at + k * s.channels, step[k].by_B, lanes);
                }
            }
        }
        for (idx j = j0; j < j1; j++) {
            const idx at = b * s.channels + j * W;
            scatter_states(gstates + (j - j0) * N, N, s.lanes(j), gh0 + at * N);
            scatter_states(grates + (j - j0) * N, N, s.lanes(j), gA_share + at * N);
            store(gD_share + at, gskips[j - j0], s.lanes(j));
        }
    });
    add_up(threads, gB_share, tasks.splits, rows * N, gB);
    add_up(threads, gC_share, tasks.splits, rows * N, gC);
    add_up(threads, gA_share, s.batch, s.channels * N, gA);
    add_up(threads, gD_share, s.batch, s.channels, gD);
}

// ---------------------------------------------------------------- one step

constexpr int PIECE = 256;  // channels a task

// Here the lanes are the states of one channel, as they lie in memory. STATES is N where it is known, else 0.
template <int STATES>
void step_channels(idx count, idx states, const float* delta, const float* A, const float* B, const float* C,
                   const float* D, float* state, float* x) {  // x becomes y
    const idx N = STATES ? STATES : states;
    for (idx d = 0; d < count; d++, A += N, state += N) {
        const vec step = splat(std::min(delta[d], FAR) * LOG2E), dx = splat(delta[d] * x[d]);
        vec sum = {};
        for (idx n = 0; n < N; n += W) {
            const int lanes = int(std::min<idx>(W, N - n));
            const vec decay = exp2(at_least(load(A + n, lanes), -FAR) * step);
            const vec h = decay * load(state + n, lanes) + dx * load(B + n, lanes);
            store(state + n, h, lanes);
            sum += h * load(C + n, lanes);
        }
        x[d] = sum_lanes(sum) + D[d] * x[d];
    }
}

template <class T>
void step(const Shape& s, int threads, const T* x, float* state, const float* delta, const float* A, const T* B,
          const T* C, const float* D, T* y) {
    const idx N = s.states, pieces = (s.channels + PIECE - 1) / PIECE;
    if (s.small()) threads = 1;
    const auto run = N == 16   ? step_channels<16>
                     : N == 8  ? step_channels<8>
                     : N == 32 ? step_channels<32>
                     : N == 64 ? step_channels<64>
                               : step_channels<0>;
    const std::unique_ptr<float[]> floats(new float[2 * s.batch * N]);
    float *B_f = floats.get(), *C_f = B_f + s.batch * N;
    convert(B, s.batch * N, B_f);
    convert(C, s.batch * N, C_f);
    parallel(threads, s.batch * pieces, [&](idx task, int) {
        const idx b = task / pieces, d = task % pieces * PIECE, at = b * s.channels + d;
        const idx count = std::min<idx>(PIECE, s.channels - d);
        float xy[PIECE];
        convert(x + at, count, xy);
        run(count, N, delta + at, A + d * N, B_f + b * N, C_f + b * N, D + d, state + at * N, xy);
        convert(xy, count, y + at);
    });
}

// ---------------------------------------------------------------- the C interface

// run(a zero of the type of x). Returns 0, or 1 where there is no memory: an exception must not cross the border to C.
template <class Run>
int with_type(int half, const Run& run) {
    try {
        half ? run(bf16{}) : run(float{});
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

template <class T>
const T* in(const void* p) {
    return static_cast<const T*>(p);
}

template <class T>
T* out(void* p) {
    return static_cast<T*>(p);
}

}  // namespace

// All arrays are contiguous. x, B, C, y and their gradients are bf16 where `half` is set, else float; all others are
// float. starts, h0, glast and the `kept` of the forward may be null.
extern "C" {

int moai_scan_chunk() { return K; }

int moai_scan_forward(idx batch, idx length, idx channels, idx states, int half, int threads, const void* x,
                      const float* delta, const float* A, const void* B, const void* C, const float* D,
                      const uint8_t* starts, const float* h0, void* y, float* last, float* kept) {
    return with_type(half, [&](auto zero) {
        using T = decltype(zero);
        forward(Shape{batch, length, channels, states}, threads, in<T>(x), delta, A, in<T>(B), in<T>(C), D, starts, h0,
                out<T>(y), last, kept);
    });
}

int moai_scan_backward(idx batch, idx length, idx channels, idx states, int half, int threads, const void* gy,
                       const float* glast, const void* x, const float* delta, const float* A, const void* B,
                       const void* C, const float* D, const uint8_t* starts, const float* kept, void* gx, float* gdelta,
                       float* gA, void* gB, void* gC, float* gD, float* gh0) {
    return with_type(half, [&](auto zero) {
        using T = decltype(zero);
        backward(Shape{batch, length, channels, states}, threads, in<T>(gy), glast, in<T>(x), delta, A, in<T>(B),
                 in<T>(C), D, starts, kept, out<T>(gx), gdelta, gA, out<T>(gB), out<T>(gC), gD, gh0);
    });
}

int moai_scan_step(idx batch, idx channels, idx states, int half, int threads, const void* x, float* state,
                   const float* delta, const float* A, const void* B, const void* C, const float* D, void* y) {
    return with_type(half, [&](auto zero) {
        using T = decltype(zero);
        step(Shape{batch, 1, channels, states}, threads, in<T>(x), state, delta, A, in<T>(B), in<T>(C), D, out<T>(y));
    });
}
}
