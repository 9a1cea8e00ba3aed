// LayerNorm of a sum: y = (s − mean) / √(var + eps) · weight + bias, s = residual + dropout(x). A warp works on a row.
#include "device.cuh"

// Values of one row before the normalisation; made anew where they are needed, which costs less than keeping them.
struct Row {
    const float *residual, *x;
    size_t first;
    Dropout dropout;

    __device__ __forceinline__ float operator[](uint32_t i) const {
        float value = x[first + i];
        if (dropout.limit != 0xffffffffu) value = dropout(value, uint32_t(first + i));
        return (residual ? residual[first + i] : 0.0f) + value;
    }
};

__device__ __forceinline__ float2 moments(const Row& row, uint32_t width, float eps) {
    uint32_t lane = threadIdx.x % WARP;
    float sum = 0, square = 0;
    for (uint32_t i = lane; i < width; i += WARP) sum += row[i];
    float mean = warp_sum(sum) / width;
    for (uint32_t i = lane; i < width; i += WARP) square += (row[i] - mean) * (row[i] - mean);
    return make_float2(mean, 1.0f / sqrtf(warp_sum(square) / width + eps));
}

// `residual` may be null; `limit` is that of Dropout, 0xffffffff drops nothing.
extern "C" __global__ void layer_norm(
    const float* residual, const float* x, const float* weight, const float* bias, float* y, uint32_t rows, uint32_t width,
    float eps, uint32_t seed, uint32_t limit, float scale
) {
    uint32_t lane = threadIdx.x % WARP, number = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (number >= rows) return;
    Row row = {residual, x, size_t(number) * width, {seed, limit, scale}};
    float2 of = moments(row, width, eps);
    for (uint32_t i = lane; i < width; i += WARP) y[row.first + i] = (row[i] - of.x) * of.y * weight[i] + bias[i];
}

// Writes ds, the gradient by the sum, and dx, that by x where it differs (null where it does not). A block takes `rows_each`
// rows; row blockIdx.x of `partial` [blocks, 2, width] receives their share of the gradients by weight and bias.
extern "C" __global__ void layer_norm_backward(
    const float* residual, const float* x, const float* weight, const float* dy, float* ds, float* dx, float* partial,
    uint32_t rows, uint32_t width, uint32_t rows_each, float eps, uint32_t seed, uint32_t limit, float scale
) {
    SHARED(float, sums);  // [warps, 2, width]
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float *dweight = sums + size_t(warp) * 2 * width, *dbias = dweight + width;
    for (uint32_t i = lane; i < 2 * width; i += WARP) dweight[i] = 0;
    __syncwarp();
    uint32_t first = blockIdx.x * rows_each, end = min(first + rows_each, rows);
    for (uint32_t number = first + warp; number < end; number += warps) {
        Row row = {residual, x, size_t(number) * width, {seed, limit, scale}};
        float2 of = moments(row, width, eps);
        float sum = 0, projection = 0;
        for (uint32_t i = lane; i < width; i += WARP) {
            float normal = (row[i] - of.x) * of.y, gradient = dy[row.first + i];
            sum += gradient * weight[i];
            projection += gradient * weight[i] * normal;
            dweight[i] += gradient * normal;
            dbias[i] += gradient;
        }
        sum = warp_sum(sum) / width;
        projection = warp_sum(projection) / width;
        for (uint32_t i = lane; i < width; i += WARP) {
            float normal = (row[i] - of.x) * of.y;
            float gradient = of.y * (dy[row.first + i] * weight[i] - sum - normal * projection);
            ds[row.first + i] = gradient;
            if (dx) dx[row.first + i] = row.dropout(gradient, uint32_t(row.first + i));
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2 * width; i += blockDim.x) {
        float sum = 0;
        for (uint32_t other = 0; other < warps; other++) sum += sums[size_t(other) * 2 * width + i];
        partial[size_t(blockIdx.x) * 2 * width + i] = sum;
    }
}
