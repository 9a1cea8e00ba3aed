// Losses of rows of x against rows of y, each times its share in the mean, and their gradients. A block works on row blockIdx.x.
#include "device.cuh"

// Rows that count, the first ones, and the share of each in the mean.
struct Counting {
    uint32_t rows;
    float share;
};

// Whether the block's row is none of those; its loss and gradient are 0 then.
__device__ __forceinline__ bool counts_nothing(const Counting& counting, float* losses, float* dx, uint32_t width) {
    if (blockIdx.x < counting.rows) return false;
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) dx[size_t(blockIdx.x) * width + i] = 0;
    return true;
}

// −Σ y · ln softmax(x)
extern "C" __global__ void soft_cross_entropy(
    const float* x, const float* y, float* losses, float* dx, uint32_t width, const Counting* counting
) {
    SHARED(float, partial);
    if (counts_nothing(*counting, losses, dx, width)) return;
    float share = counting->share;
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
    if (threadIdx.x == 0) losses[blockIdx.x] = (all * logf(sum) - product) * share;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        dx[first + i] = (expf(x[first + i] - most) / sum * all - y[first + i]) * share;
    }
}

// Σ max(x, 0) − x · y + ln(1 + exp(−|x|))
extern "C" __global__ void binary_cross_entropy(
    const float* x, const float* y, float* losses, float* dx, uint32_t width, const Counting* counting
) {
    SHARED(float, partial);
    if (counts_nothing(*counting, losses, dx, width)) return;
    float share = counting->share;
    size_t first = size_t(blockIdx.x) * width;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        float value = x[first + i], target = y[first + i];
        sum += fmaxf(value, 0.0f) - value * target + log1pf(expf(-fabsf(value)));
        dx[first + i] = (1.0f / (1.0f + expf(-value)) - target) * share;
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum * share;
}

// Σ (x − y)²
extern "C" __global__ void squared_error(
    const float* x, const float* y, float* losses, float* dx, uint32_t width, const Counting* counting
) {
    SHARED(float, partial);
    if (counts_nothing(*counting, losses, dx, width)) return;
    float share = counting->share;
    size_t first = size_t(blockIdx.x) * width;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        float off = x[first + i] - y[first + i];
        sum += off * off;
        dx[first + i] = 2.0f * off * share;
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum * share;
}
