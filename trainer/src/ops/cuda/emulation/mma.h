// What the kernels use of CUDA's warp matrix functions. A factor is whole in every thread, which reads it where and when it
// comes by: memory that another thread has not written yet, for want of a barrier, shows. Of sums each thread has eight.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment;

// Row i of a, or column i of b.
template <typename Use, typename Layout>
struct fragment<Use, 16, 16, 16, __nv_bfloat16, Layout> {
    float at[16][16];
};

template <>
struct fragment<accumulator, 16, 16, 16, float> {
    static constexpr int num_elements = 8;
    float x[8];
};

// A device demands both, and does not say so where they fail.
template <typename T>
bool aligned(const T* from, unsigned pitch) {
    return reinterpret_cast<uintptr_t>(from) % 32 == 0 && pitch * sizeof(T) % 16 == 0;
}

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout>& to, const __nv_bfloat16* from, unsigned pitch) {
    constexpr bool by_lines = std::is_same<Use, matrix_a>::value == std::is_same<Layout, row_major>::value;
    for (unsigned i = 0; i < 16; i++) {
        for (unsigned k = 0; k < 16; k++) {
            float value = __bfloat162float(by_lines ? from[i * pitch + k] : from[k * pitch + i]);
            to.at[i][k] = aligned(from, pitch) ? value : std::numeric_limits<float>::quiet_NaN();
        }
    }
}

inline void fill_fragment(fragment<accumulator, 16, 16, 16, float>& sums, float value) {
    for (float& sum : sums.x) sum = value;
}

template <typename A, typename B>
void mma_sync(
    fragment<accumulator, 16, 16, 16, float>& to, const fragment<matrix_a, 16, 16, 16, __nv_bfloat16, A>& a,
    const fragment<matrix_b, 16, 16, 16, __nv_bfloat16, B>& b, const fragment<accumulator, 16, 16, 16, float>& sums
) {
    for (unsigned e = 0; e < 8; e++) {
        unsigned place = emulation::thread_number() % 32 + 32 * e;
        float sum = sums.x[e];
        for (unsigned k = 0; k < 16; k++) sum += a.at[place / 16][k] * b.at[place % 16][k];
        to.x[e] = sum;
    }
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& sums, unsigned pitch, layout_t layout) {
    for (unsigned e = 0; e < 8; e++) {
        unsigned place = emulation::thread_number() % 32 + 32 * e, row = place / 16, column = place % 16;
        float value = aligned(to, pitch) ? sums.x[e] : std::numeric_limits<float>::quiet_NaN();
        to[layout == mem_row_major ? row * pitch + column : column * pitch + row] = value;
    }
}

}  // namespace wmma
}  // namespace nvcuda
