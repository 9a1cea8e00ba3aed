// Products of small matrices on tensor cores, each by a whole warp: factors in bf16, sums in f32. Which lane has which values is the PTX
// ISA's ("Matrix Fragments for mma.m16n8k16", "ldmatrix").
#pragma once

#include "device.cuh"

#ifdef UNIMO_EMULATED
#include "../emulation/mma.h"
#else

// Two values as one word, the first in its lower half.
__device__ __forceinline__ uint32_t pair(float first, float second) {
    __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<uint32_t*>(&both);
}

// Each of two values added to its like, and rounded.
__device__ __forceinline__ uint32_t sum_of_pairs(uint32_t a, uint32_t b) {
    __nv_bfloat162 sum = __hadd2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&sum);
}

// Four matrices [8, 8] from shared memory. Lane i names row i % 8 of matrix i / 8, which begins in a place of sixteen bytes; word m
// of a lane becomes row lane / 4, columns 2 · (lane % 4) and the next, of matrix m.
__device__ __forceinline__ void load_four(uint32_t (&words)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same of the matrices' transposes.
__device__ __forceinline__ void load_four_turned(uint32_t (&words)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// sums[16, 8] += a[16, 16] · b[16, 8]. Of a, words 0 to 3 are the matrices [8, 8] at (0, 0), (8, 0), (0, 8) and (8, 8), as `load_four`
// gives them; of b, the two words are those at (0, 0) and (8, 0), as `load_four_turned` does. Of the sums a lane has row lane / 4,
// columns 2 · (lane % 4) and the next, and the same of the row eight below.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t upper, uint32_t lower) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(upper), "r"(lower));
}

#endif
