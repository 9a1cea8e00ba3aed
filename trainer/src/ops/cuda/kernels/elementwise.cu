// Operators on each value alone, and what changes a matrix's form.
#include "device.cuh"

#define FOR_EACH(i, count) \
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < (count); i += size_t(gridDim.x) * blockDim.x)

__device__ __forceinline__ float normal_distribution(float x) { return 0.5f * (1.0f + erff(x * 0.70710678118654752f)); }

// y = GELU(x + bias), x [rows, width]; no bias where it is null.
extern "C" __global__ void gelu(const float* x, const float* bias, float* y, size_t count, uint32_t width) {
    FOR_EACH(i, count) {
        float value = x[i] + (bias ? bias[i % width] : 0.0f);
        y[i] = value * normal_distribution(value);
    }
}

extern "C" __global__ void gelu_backward(
    const float* x, const float* bias, const float* dy, float* dx, size_t count, uint32_t width
) {
    FOR_EACH(i, count) {
        float value = x[i] + (bias ? bias[i % width] : 0.0f);
        float density = 0.39894228040143268f * expf(-0.5f * value * value);
        dx[i] = dy[i] * (normal_distribution(value) + value * density);
    }
}

extern "C" __global__ void relu6(const float* x, float* y, size_t count) {
    FOR_EACH(i, count) y[i] = fminf(fmaxf(x[i], 0.0f), 6.0f);
}

// From the operator's input or its result.
extern "C" __global__ void relu6_backward(const float* y, const float* dy, float* dx, size_t count) {
    FOR_EACH(i, count) dx[i] = y[i] > 0.0f && y[i] < 6.0f ? dy[i] : 0.0f;
}

// y = residual + dropout(x); with a null residual, the backward pass by x.
extern "C" __global__ void dropout_add(
    const float* residual, const float* x, float* y, size_t count, uint32_t seed, uint32_t limit, float scale
) {
    Dropout dropout = {seed, limit, scale};
    FOR_EACH(i, count) y[i] = (residual ? residual[i] : 0.0f) + dropout(x[i], uint32_t(i));
}

// Every row of y [rows, width] becomes `row`.
extern "C" __global__ void fill_rows(const float* row, float* y, size_t count, uint32_t width) {
    FOR_EACH(i, count) y[i] = row[i % width];
}

// values *= factor[0]
extern "C" __global__ void scale_by(float* values, const float* factor, size_t count) {
    FOR_EACH(i, count) values[i] *= factor[0];
}

extern "C" __global__ void to_bf16(const float* x, __nv_bfloat16* y, size_t count) {
    FOR_EACH(i, count) y[i] = __float2bfloat16(x[i]);
}
