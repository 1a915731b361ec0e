// RMSNorm of a few rows, as in decoding, where to start the library's dozen kernels costs more than the sum.
//
// The contract and the readable reference are in norm.py. Built and loaded by native.py.

#include "native.h"

#include <cmath>

using namespace moai;

namespace {

template <class In, class Weight, class Out>
void rms_norm(idx rows, idx width, float eps, const In* x, const Weight* weight, Out* y) {
    for (idx r = 0; r < rows; r++, x += width, y += width) {
        vec sum = {};
        for (idx i = 0; i < width; i += W) {
            const vec v = load(x + i, width - i < W ? int(width - i) : W);
            sum += v * v;
        }
        const vec inverse = splat(1.f / std::sqrt(sum_lanes(sum) / float(width) + eps));
        for (idx i = 0; i < width; i += W) {
            const int lanes = width - i < W ? int(width - i) : W;
            store(y + i, load(x + i, lanes) * inverse * load(weight + i, lanes), lanes);
        }
    }
}

}  // namespace

extern "C" {

int moai_rms_norm_fp32(idx rows, idx width, float eps, const float* x, const float* weight, float* y) {
    rms_norm(rows, width, eps, x, weight, y);
    return 0;
}

int moai_rms_norm_bf16(idx rows, idx width, float eps, const bf16* x, const bf16* weight, bf16* y) {
    rms_norm(rows, width, eps, x, weight, y);
    return 0;
}
}
