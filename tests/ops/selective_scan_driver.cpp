// Runs the native selective scan on odd sizes with arrays of exactly the right length, to be built with sanitizers.
#include "selective_scan.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace {

// A stand-in for GOMP_parallel: real threads, for the code that shares out tasks.
void run_team(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; i++) team.emplace_back(work, data);
    work(data);
    for (std::thread& thread : team) thread.join();
}

template <class T>
struct Array : std::vector<T> {
    Array(idx size, std::mt19937& random, float low, float high) : std::vector<T>(size) {
        std::uniform_real_distribution<float> uniform(low, high);
        for (T& value : *this) {
            float drawn = uniform(random);
            convert(&drawn, 1, &value);
        }
        this->shrink_to_fit();
    }
};

double checksum = 0;

template <class T>
bool run(idx b, idx l, idx d, idx n, int threads, bool optional) {
    std::mt19937 random(1);
    const int half = sizeof(T) == 2;
    Array<T> x(b * l * d, random, -1, 1), B(b * l * n, random, -1, 1), C(b * l * n, random, -1, 1),
        gy(b * l * d, random, -1, 1);
    Array<T> y(b * l * d, random, 0, 0), gx = y, gB = B, gC = C;
    Array<float> delta(b * l * d, random, 0, 1), A(d * n, random, -9, 0), D(d, random, -1, 1),
        h0(b * d * n, random, -1, 1);
    Array<float> last = h0, gh = h0, gh0 = h0, gdelta = delta, gA = A, gD = D, state = h0;
    Array<float> kept((l + K - 1) / K * b * d * n, random, 0, 0);
    std::vector<uint8_t> starts(b * l);
    for (idx i = 0; i < b * l; i++) starts[i] = random() % 7 == 0;
    const uint8_t* s = optional ? starts.data() : nullptr;
    int failed = moai_scan_forward(b, l, d, n, half, threads, x.data(), delta.data(), A.data(), B.data(), C.data(),
                                   D.data(), s, optional ? h0.data() : nullptr, y.data(), last.data(), kept.data());
    failed |= moai_scan_backward(b, l, d, n, half, threads, gy.data(), optional ? gh.data() : nullptr, x.data(),
                                 delta.data(), A.data(), B.data(), C.data(), D.data(), s, kept.data(), gx.data(),
                                 gdelta.data(), gA.data(), gB.data(), gC.data(), gD.data(), gh0.data());
    failed |= moai_scan_step(b, d, n, half, threads, x.data(), state.data(), delta.data(), A.data(), B.data(), C.data(),
                             D.data(), y.data());
    for (const Array<float>* array : {&last, &gdelta, &gA, &gD, &gh0, &state})
        for (float value : *array) checksum += value, failed |= !std::isfinite(value);
    for (const Array<T>* array : {&y, &gx, &gB, &gC})
        for (T value : *array) checksum += value;
    return !failed;
}

}  // namespace

int main() {
    moai_use_team(reinterpret_cast<void*>(&run_team));
    int runs = 0;
    for (idx l : {1, 2, 31, 32, 33, 70})
        for (idx d : {1, 3, 15, 16, 17, 40})
            for (idx n : {1, 3, 4, 5, 8, 13, 16, 21})
                for (bool optional : {false, true}) {
                    if (!run<float>(2, l, d, n, 2, optional) || !run<bf16>(1, l, d, n, 1, optional)) {
                        std::printf("failed at L %d D %d N %d\n", int(l), int(d), int(n));
                        return 1;
                    }
                    runs++;
                }
    if (!run<float>(3, 70, 600, 16, 2, true) || !run<float>(1, 33, 300, 64, 3, false))
        return 1;  // more than one thread
    std::printf("%d sizes, checksum %.17g\n", runs, checksum);
}
