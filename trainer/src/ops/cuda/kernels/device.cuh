// What the kernels share. They compile for a device with nvcc and, for tests, for the CPU; see ../emulation.
#pragma once

#ifdef UNIMO_EMULATED
#include "../emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define SHARED(type, name) extern __shared__ __align__(32) type name[]
#endif

#define WARP 32u
#define ALL_LANES 0xffffffffu

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

    __device__ __forceinline__ float operator()(float value, uint32_t index) const {
        return draw(seed, index) <= limit ? value * scale : 0.0f;
    }
};
