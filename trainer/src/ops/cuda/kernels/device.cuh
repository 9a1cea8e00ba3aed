// What the kernels share. They compile for a device with nvcc and, for tests, for the CPU; see ../emulation.
#pragma once

#ifdef UNIMO_EMULATED
#include "../emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define SHARED(type, name) extern __shared__ __align__(32) type name[]

// 2 to the power of x, and 1 / x, to the last bits but two; what is below the normal numbers is zero.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

#define WARP 32u
#define ALL_LANES 0xffffffffu

constexpr float LOG2_E = 1.44269504088896341f;

using bf16 = __nv_bfloat16;

// Kernels compute in f32, whatever lies in memory: f32 or, rounded to the nearest, bf16.
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void put(float& to, float value) { to = value; }
__device__ __forceinline__ void put(bf16& to, float value) { to = __float2bfloat16(value); }

// Values that a thread reads or writes at one time: sixteen bytes of bf16, twice as many of f32.
constexpr uint32_t FEW = 8;

__device__ __forceinline__ bool in_sixteens(const void* place) { return reinterpret_cast<size_t>(place) % 16 == 0; }

// FEW values as they lie in memory, in places of sixteen bytes.
template <typename T>
struct Few {
    uint4 words[FEW * sizeof(T) / 16];
};

template <typename T>
__device__ __forceinline__ Few<T> fetch(const T* from) {
    Few<T> few;
#pragma unroll
    for (uint32_t i = 0; i < FEW * sizeof(T) / 16; i++) few.words[i] = reinterpret_cast<const uint4*>(from)[i];
    return few;
}

template <typename T>
__device__ __forceinline__ void widen(const Few<T>& few, float (&to)[FEW]) {
    union {
        Few<T> few;
        T values[FEW];
    } all = {few};
#pragma unroll
    for (uint32_t e = 0; e < FEW; e++) to[e] = widened(all.values[e]);
}

template <typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[FEW]) {
    union {
        Few<T> few;
        T values[FEW];
    } all;
#pragma unroll
    for (uint32_t e = 0; e < FEW; e++) put(all.values[e], from[e]);
#pragma unroll
    for (uint32_t i = 0; i < FEW * sizeof(T) / 16; i++) reinterpret_cast<uint4*>(to)[i] = all.few.words[i];
}

// The first `count` of FEW values from `from` on; the others become zero.
template <typename T>
__device__ __forceinline__ void read_few(const T* from, uint32_t count, float (&to)[FEW]) {
    if (count >= FEW && in_sixteens(from)) {
        widen(fetch(from), to);
    } else {
#pragma unroll
        for (uint32_t e = 0; e < FEW; e++) to[e] = e < count ? widened(from[e]) : 0.0f;
    }
}

// Writes the first `count` of FEW values.
template <typename T>
__device__ __forceinline__ void write_few(T* to, uint32_t count, const float (&from)[FEW]) {
    if (count >= FEW && in_sixteens(to)) {
        store(to, from);
    } else {
#pragma unroll
        for (uint32_t e = 0; e < FEW; e++) {
            if (e < count) put(to[e], from[e]);
        }
    }
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, lanes));
    return value;
}

// Sum over the block's threads, in every thread. `partial` has room for a value a warp.
__device__ __forceinline__ float block_sum(float value, float* partial) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) sum += partial[warp];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ float block_max(float value, float* partial) {
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    float most = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / WARP; warp++) most = fmaxf(most, partial[warp]);
    __syncthreads();
    return most;
}

// A draw for position `index` of stream `seed`: `draw` of ../../kernels.rs, bit by bit.
__device__ __forceinline__ uint32_t draw(uint32_t seed, uint32_t index) {
    uint32_t x = (index * 0x9e3779b9u) ^ seed;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// What keeps a value: draws up to `limit`, and what it is multiplied by then.
struct Dropout {
    uint32_t seed, limit;
    float scale;

    __device__ __forceinline__ bool keeps(uint32_t index) const { return draw(seed, index) <= limit; }

    __device__ __forceinline__ float operator()(float value, uint32_t index) const {
        return keeps(index) ? value * scale : 0.0f;
    }
};

// With a seed that lies in memory, where the next pass of the same kernels has another one; nowhere if nothing is dropped.
__device__ __forceinline__ Dropout seeded(const uint32_t* seed, uint32_t limit, float scale) {
    return {limit == 0xffffffffu ? 0 : *seed, limit, scale};
}

// What a thread has of a row-major matrix: FEW columns, of the rows from `first` on to `end`.
struct Columns {
    uint32_t width, column, count, first, end;

    __device__ __forceinline__ Columns(uint32_t rows, uint32_t width, uint32_t rows_each)
        : width(width), column((blockIdx.x * blockDim.x + threadIdx.x) * FEW),
          count(column < width ? min(FEW, width - column) : 0), first(blockIdx.y * rows_each),
          end(min(first + rows_each, rows)) {}

    // Its first value of a row.
    __device__ __forceinline__ size_t at(uint32_t row) const { return size_t(row) * width + column; }

    // Whether FEW of each row lie in places of sixteen bytes.
    __device__ __forceinline__ bool whole(const void* matrix) const {
        return count == FEW && width % FEW == 0 && in_sixteens(matrix);
    }
};
