// Operators on each value alone, and what changes a matrix's form.
#include "device.cuh"

#define FOR_EACH(i, count) \
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < (count); i += size_t(gridDim.x) * blockDim.x)

// The normal distribution's function and its density, the latter without its factor 1 / √2π.
struct Normal {
    float below, exponential;
};

__device__ __forceinline__ Normal normal_at(float x, float) {
    return {0.5f * (1.0f + erff(x * 0.70710678118654752f)), expf(-0.5f * x * x)};
}

// Of what is rounded to bf16 afterwards: to 1e-7, by the one exponential for both (Abramowitz and Stegun, 7.1.26).
__device__ __forceinline__ Normal normal_at(float x, bf16) {
    float exponential = power_of_two(x * x * (-0.5f * LOG2_E));
    float t = reciprocal(1.0f + 0.3275911f * 0.70710678118654752f * fabsf(x));
    float sum = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float beyond = 0.5f * sum * exponential;
    return {x < 0.0f ? beyond : 1.0f - beyond, exponential};
}

// The columns' part of a row; zeros where it is null.
__device__ __forceinline__ void read_columns(const float* row, const Columns& columns, float (&to)[FEW]) {
    read_few(row ? row + columns.column : row, row ? columns.count : 0, to);
}

// Rows that are read at one time, where they can be read so.
constexpr uint32_t AT_ONCE = 4;

template <typename T>
__device__ __forceinline__ void gelu_of_few(const float (&added)[FEW], float (&some)[FEW]) {
    for (uint32_t e = 0; e < FEW; e++) {
        float value = some[e] + added[e];
        some[e] = value * normal_at(value, T()).below;
    }
}

// y = GELU(x + bias), x [rows, width]; no bias where it is null.
template <typename T>
__device__ __forceinline__ void gelu_of(const T* x, const float* bias, T* y, Columns columns) {
    if (columns.count == 0) return;
    float added[FEW], some[FEW];
    read_columns(bias, columns, added);
    uint32_t row = columns.first;
    for (bool whole = columns.whole(x) && columns.whole(y); whole && row + AT_ONCE <= columns.end; row += AT_ONCE) {
        Few<T> rows[AT_ONCE];
#pragma unroll
        for (uint32_t r = 0; r < AT_ONCE; r++) rows[r] = fetch(x + columns.at(row + r));
#pragma unroll
        for (uint32_t r = 0; r < AT_ONCE; r++) {
            widen(rows[r], some);
            gelu_of_few<T>(added, some);
            store(y + columns.at(row + r), some);
        }
    }
    for (; row < columns.end; row++) {
        read_few(x + columns.at(row), columns.count, some);
        gelu_of_few<T>(added, some);
        write_few(y + columns.at(row), columns.count, some);
    }
}

// Makes dx of dy, and adds it up.
template <typename T>
__device__ __forceinline__ void gelu_backward_of_few(
    const float (&added)[FEW], const float (&some)[FEW], float (&by)[FEW], float (&sum)[FEW]
) {
    for (uint32_t e = 0; e < FEW; e++) {
        float value = some[e] + added[e];
        Normal normal = normal_at(value, T());
        by[e] *= normal.below + value * 0.39894228040143268f * normal.exponential;
        sum[e] += by[e];
    }
}

// The backward pass; row blockIdx.y of `sums` receives the sum of dx over the block's rows, unless it is null.
template <typename T>
__device__ __forceinline__ void gelu_backward_of(
    const T* x, const float* bias, const T* dy, T* dx, float* sums, Columns columns
) {
    if (columns.count == 0) return;
    float added[FEW], some[FEW], by[FEW], sum[FEW] = {};
    read_columns(bias, columns, added);
    uint32_t row = columns.first;
    bool whole = columns.whole(x) && columns.whole(dy) && columns.whole(dx);
    for (; whole && row + AT_ONCE <= columns.end; row += AT_ONCE) {
        Few<T> rows[AT_ONCE], by_rows[AT_ONCE];
#pragma unroll
        for (uint32_t r = 0; r < AT_ONCE; r++) {
            rows[r] = fetch(x + columns.at(row + r));
            by_rows[r] = fetch(dy + columns.at(row + r));
        }
#pragma unroll
        for (uint32_t r = 0; r < AT_ONCE; r++) {
            widen(rows[r], some);
            widen(by_rows[r], by);
            gelu_backward_of_few<T>(added, some, by, sum);
            store(dx + columns.at(row + r), by);
        }
    }
    for (; row < columns.end; row++) {
        read_few(x + columns.at(row), columns.count, some);
        read_few(dy + columns.at(row), columns.count, by);
        gelu_backward_of_few<T>(added, some, by, sum);
        write_few(dx + columns.at(row), columns.count, by);
    }
    if (sums) write_few(sums + columns.at(blockIdx.y), columns.count, sum);
}

// Every row of y [rows, width] becomes `row`.
template <typename T>
__device__ __forceinline__ void fill(const float* row, T* y, Columns columns) {
    if (columns.count == 0) return;
    float values[FEW];
    read_columns(row, columns, values);
    for (uint32_t row = columns.first; row < columns.end; row++) write_few(y + columns.at(row), columns.count, values);
}

template <typename T>
__device__ __forceinline__ void cut_off(const T* x, T* y, size_t count) {
    float some[FEW];
    FOR_EACH(i, (count + FEW - 1) / FEW) {
        uint32_t left = uint32_t(min(size_t(FEW), count - i * FEW));
        read_few(x + i * FEW, left, some);
        for (uint32_t e = 0; e < FEW; e++) some[e] = fminf(fmaxf(some[e], 0.0f), 6.0f);
        write_few(y + i * FEW, left, some);
    }
}

// From the operator's input or its result.
template <typename T>
__device__ __forceinline__ void cut_off_backward(const T* y, const T* dy, T* dx, size_t count) {
    float some[FEW], by[FEW];
    FOR_EACH(i, (count + FEW - 1) / FEW) {
        uint32_t left = uint32_t(min(size_t(FEW), count - i * FEW));
        read_few(y + i * FEW, left, some);
        read_few(dy + i * FEW, left, by);
        for (uint32_t e = 0; e < FEW; e++) by[e] = some[e] > 0.0f && some[e] < 6.0f ? by[e] : 0.0f;
        write_few(dx + i * FEW, left, by);
    }
}

template <typename T>
__device__ __forceinline__ void add(const T* a, const T* b, T* y, size_t count) {
    float some[FEW], others[FEW];
    FOR_EACH(i, (count + FEW - 1) / FEW) {
        uint32_t left = uint32_t(min(size_t(FEW), count - i * FEW));
        read_few(a + i * FEW, left, some);
        read_few(b + i * FEW, left, others);
        for (uint32_t e = 0; e < FEW; e++) some[e] += others[e];
        write_few(y + i * FEW, left, some);
    }
}

#define OF_TYPE(T, suffix)                                                                                                      \
    extern "C" __global__ void gelu##suffix(                                                                                    \
        const T* x, const float* bias, T* y, uint32_t rows, uint32_t width, uint32_t rows_each                                  \
    ) {                                                                                                                         \
        gelu_of(x, bias, y, Columns(rows, width, rows_each));                                                                   \
    }                                                                                                                           \
    extern "C" __global__ void gelu_backward##suffix(                                                                           \
        const T* x, const float* bias, const T* dy, T* dx, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each       \
    ) {                                                                                                                         \
        gelu_backward_of(x, bias, dy, dx, sums, Columns(rows, width, rows_each));                                               \
    }                                                                                                                           \
    extern "C" __global__ void fill_rows##suffix(const float* row, T* y, uint32_t rows, uint32_t width, uint32_t rows_each) {   \
        fill(row, y, Columns(rows, width, rows_each));                                                                          \
    }                                                                                                                           \
    extern "C" __global__ void relu6##suffix(const T* x, T* y, size_t count) { cut_off(x, y, count); }                          \
    extern "C" __global__ void relu6_backward##suffix(const T* y, const T* dy, T* dx, size_t count) {                           \
        cut_off_backward(y, dy, dx, count);                                                                                     \
    }                                                                                                                           \
    extern "C" __global__ void sum_of_two##suffix(const T* a, const T* b, T* y, size_t count) { add(a, b, y, count); }

OF_TYPE(float, )
OF_TYPE(bf16, _bf16)
#undef OF_TYPE

// y = exp(x) within bounds.
extern "C" __global__ void bounded_exp(const float* x, float* y, size_t count, float least, float most) {
    FOR_EACH(i, count) y[i] = fminf(fmaxf(expf(x[i]), least), most);
}

extern "C" __global__ void bounded_exp_backward(const float* y, const float* dy, float* dx, size_t count, float least, float most) {
    FOR_EACH(i, count) dx[i] = y[i] > least && y[i] < most ? dy[i] * y[i] : 0.0f;
}

// y = residual + dropout(x); with a null residual, the backward pass by x.
extern "C" __global__ void dropout_add(
    const float* residual, const float* x, float* y, size_t count, const uint32_t* seed, uint32_t limit, float scale
) {
    Dropout dropout = seeded(seed, limit, scale);
    FOR_EACH(i, count) y[i] = (residual ? residual[i] : 0.0f) + dropout(x[i], uint32_t(i));
}

// y = factor · x
extern "C" __global__ void scaled(const float* x, float* y, size_t count, float factor) {
    FOR_EACH(i, count) y[i] = factor * x[i];
}

// y = max(x, 0)
extern "C" __global__ void relu(const float* x, float* y, size_t count) {
    FOR_EACH(i, count) y[i] = fmaxf(x[i], 0.0f);
}

extern "C" __global__ void relu_backward(const float* x, const float* dy, float* dx, size_t count) {
    FOR_EACH(i, count) dx[i] = x[i] > 0 ? dy[i] : 0.0f;
}

// y = max(a, 0) · max(b, 0)
extern "C" __global__ void relu_product(const float* a, const float* b, float* y, size_t count) {
    FOR_EACH(i, count) y[i] = fmaxf(a[i], 0.0f) * fmaxf(b[i], 0.0f);
}

extern "C" __global__ void relu_product_backward(
    const float* a, const float* b, const float* dy, float* da, float* db, size_t count
) {
    FOR_EACH(i, count) {
        da[i] = a[i] > 0 ? dy[i] * fmaxf(b[i], 0.0f) : 0.0f;
        db[i] = b[i] > 0 ? dy[i] * fmaxf(a[i], 0.0f) : 0.0f;
    }
}

// values *= factor[0]
extern "C" __global__ void scale_by(float* values, const float* factor, size_t count) {
    if (factor[0] == 1.0f) return;
    FOR_EACH(i, count) values[i] *= factor[0];
}

template <typename From, typename To>
__device__ __forceinline__ void convert(const From* x, To* y, size_t count) {
    float some[FEW];
    FOR_EACH(i, (count + FEW - 1) / FEW) {
        uint32_t left = uint32_t(min(size_t(FEW), count - i * FEW));
        read_few(x + i * FEW, left, some);
        write_few(y + i * FEW, left, some);
    }
}

extern "C" __global__ void to_bf16(const float* x, bf16* y, size_t count) { convert(x, y, count); }

extern "C" __global__ void to_f32(const bf16* x, float* y, size_t count) { convert(x, y, count); }

// A piece of a matrix that is to be rounded: blockIdx.x is its number.
struct Rounded {
    const float* from;
    bf16* to;
    uint32_t count, unused;
};

// All of several matrices at once.
extern "C" __global__ void round_pieces(const Rounded* pieces) {
    Rounded piece = pieces[blockIdx.x];
    float some[FEW];
    for (uint32_t i = threadIdx.x * FEW; i < piece.count; i += blockDim.x * FEW) {
        read_few(piece.from + i, piece.count - i, some);
        write_few(piece.to + i, piece.count - i, some);
    }
}
