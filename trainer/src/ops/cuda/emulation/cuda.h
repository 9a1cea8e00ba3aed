// What the kernels use of CUDA, for a C++ compiler: blocks run one after another, the threads of a block as fibers that
// change places at barriers. Not fast, but the same arithmetic, and a barrier that not all threads reach is an error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
// Blocks run one after another, so one copy serves them all.
#define __shared__ static
#define SHARED(type, name) type* name = reinterpret_cast<type*>(emulation::dynamic_shared())

namespace emulation {

struct Index {
    unsigned x, y, z;
};

Index& block_index();
Index& block_size();
Index& grid_size();
// Of the thread that runs.
unsigned thread_number();
void* dynamic_shared();
// Returns once all threads of the block, or of the warp, are there.
void wait_for_block();
void wait_for_warp();
// A word that every thread of the block shows to the others.
uint32_t& shown(unsigned thread);
// Words that a lane shows to those of its warp at one time.
constexpr unsigned WORDS_SHOWN = 6;
// What every lane of the warp shows here; it is there until the warp's next but one time.
const uint32_t (*show(const uint32_t (&own)[WORDS_SHOWN]))[WORDS_SHOWN];

template <typename T>
T exchange(T value, unsigned from) {
    static_assert(sizeof(T) == sizeof(uint32_t), "shuffles move words");
    std::memcpy(&shown(thread_number()), &value, sizeof value);
    wait_for_warp();
    T taken;
    std::memcpy(&taken, &shown(from), sizeof taken);
    wait_for_warp();
    return taken;
}

struct Thread {
    unsigned x = thread_number(), y = 0, z = 0;
};

}  // namespace emulation

#define threadIdx (emulation::Thread())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp() { emulation::wait_for_warp(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulation::exchange(value, emulation::thread_number() ^ unsigned(lanes));
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulation::exchange(value, (emulation::thread_number() & ~31u) | unsigned(lane));
}

struct float2 {
    float x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline size_t min(size_t a, size_t b) { return a < b ? a : b; }
using std::isfinite;

struct __nv_bfloat16 {
    uint16_t bits;
};

// Rounds to the nearest, ties to even, as the device does.
inline __nv_bfloat16 __float2bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {uint16_t(0x7fff)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline float power_of_two(float x) {
    float y = std::exp2(x);
    return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

inline float reciprocal(float x) { return 1.0f / x; }
