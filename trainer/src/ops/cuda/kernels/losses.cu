// Losses of rows of x against rows of y, and their gradients, times `share`. A block works on row blockIdx.x.
#include "device.cuh"

// −Σ y · ln softmax(x)
extern "C" __global__ void soft_cross_entropy(
    const float* x, const float* y, float* losses, float* dx, uint32_t width, float share
) {
    SHARED(float, partial);
    size_t first = size_t(blockIdx.x) * width;
    float most = -INFINITY, sum = 0, all = 0, product = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) most = fmaxf(most, x[first + i]);
    most = block_max(most, partial);
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        sum += expf(x[first + i] - most);
        all += y[first + i];
        product += y[first + i] * (x[first + i] - most);
    }
    sum = block_sum(sum, partial);
    all = block_sum(all, partial);
    product = block_sum(product, partial);
    if (threadIdx.x == 0) losses[blockIdx.x] = all * logf(sum) - product;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        dx[first + i] = (expf(x[first + i] - most) / sum * all - y[first + i]) * share;
    }
}

// Σ max(x, 0) − x · y + ln(1 + exp(−|x|))
extern "C" __global__ void binary_cross_entropy(
    const float* x, const float* y, float* losses, float* dx, uint32_t width, float share
) {
    SHARED(float, partial);
    size_t first = size_t(blockIdx.x) * width;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        float value = x[first + i], target = y[first + i];
        sum += fmaxf(value, 0.0f) - value * target + log1pf(expf(-fabsf(value)));
        dx[first + i] = (1.0f / (1.0f + expf(-value)) - target) * share;
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum;
}

// Σ (x − y)²
extern "C" __global__ void squared_error(
    const float* x, const float* y, float* losses, float* dx, uint32_t width, float share
) {
    SHARED(float, partial);
    size_t first = size_t(blockIdx.x) * width;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        float off = x[first + i] - y[first + i];
        sum += off * off;
        dx[first + i] = 2.0f * off * share;
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum;
}
