// 3×3 convolutions over square images [images, side², channels]: depthwise ones with ReLU6, weight [9, channels], and what others see.
#include "device.cuh"

// Stride 1 pads one pixel all round, stride 2 one at bottom and right.
struct Plane {
    uint32_t side, stride, channels;

    __device__ __forceinline__ uint32_t out() const { return side / stride; }
    __device__ __forceinline__ int before() const { return stride == 1 ? 1 : 0; }
    __device__ __forceinline__ size_t at(int row, int column, uint32_t channel) const {
        return size_t(row * int(side) + column) * channels + channel;
    }
    // The row (or column) of the result that sees row `at` in place `k` of the kernel, or a negative number.
    __device__ __forceinline__ int seen_by(int at, int k) const {
        int first = at + before() - k;
        return first < 0 || first % int(stride) != 0 ? -1 : first / int(stride);
    }
    __device__ __forceinline__ bool holds(int row, int column) const {
        return row >= 0 && column >= 0 && row < int(side) && column < int(side);
    }
};

extern "C" __global__ void depthwise_relu6(
    const float* x, const float* weight, const float* bias, float* y, size_t count, uint32_t side, uint32_t stride,
    uint32_t channels
) {
    Plane plane = {side, stride, channels};
    uint32_t out = plane.out();
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t channel = i % channels, pixel = i / channels % (out * out);
        const float* image = x + i / channels / (out * out) * side * side * channels;
        float sum = bias[channel];
        for (int k = 0; k < 9; k++) {
            int row = int(pixel / out * stride) + k / 3 - plane.before();
            int column = int(pixel % out * stride) + k % 3 - plane.before();
            if (plane.holds(row, column)) sum += image[plane.at(row, column, channel)] * weight[k * channels + channel];
        }
        y[i] = fminf(fmaxf(sum, 0.0f), 6.0f);
    }
}

// dx of every input pixel, from the results that saw it; `gradient` is dy where y lies between 0 and 6.
extern "C" __global__ void depthwise_relu6_input_backward(
    const float* gradient, const float* weight, float* dx, size_t count, uint32_t side, uint32_t stride, uint32_t channels
) {
    Plane plane = {side, stride, channels};
    int out = int(plane.out());
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t channel = i % channels, pixel = i / channels % (side * side);
        const float* image = gradient + i / channels / (side * side) * out * out * channels;
        float sum = 0;
        for (int k = 0; k < 9; k++) {
            int row = plane.seen_by(int(pixel / side), k / 3), column = plane.seen_by(int(pixel % side), k % 3);
            if (row >= 0 && row < out && column >= 0 && column < out) {
                sum += image[size_t(row * out + column) * channels + channel] * weight[k * channels + channel];
            }
        }
        dx[i] = sum;
    }
}

// Shares of the gradients by weight and bias: row blockIdx.y of `partial` [blocks, 10, channels] is that of `images_each` images.
// Ten rows: the nine positions of the kernel, then the bias.
extern "C" __global__ void depthwise_relu6_weight_backward(
    const float* x, const float* gradient, float* partial, uint32_t images, uint32_t images_each, uint32_t side, uint32_t stride,
    uint32_t channels
) {
    Plane plane = {side, stride, channels};
    uint32_t out = plane.out(), i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 10 * channels) return;
    uint32_t k = i / channels, channel = i % channels;
    uint32_t first = blockIdx.y * images_each, end = min(first + images_each, images);
    float sum = 0;
    for (uint32_t image = first; image < end; image++) {
        for (uint32_t pixel = 0; pixel < out * out; pixel++) {
            float by_result = gradient[(size_t(image) * out * out + pixel) * channels + channel];
            if (k == 9) {
                sum += by_result;
                continue;
            }
            int row = int(pixel / out * stride) + int(k / 3) - plane.before();
            int column = int(pixel % out * stride) + int(k % 3) - plane.before();
            if (plane.holds(row, column)) {
                sum += by_result * x[size_t(image) * side * side * channels + plane.at(row, column, channel)];
            }
        }
    }
    partial[size_t(blockIdx.y) * 10 * channels + i] = sum;
}

// What a 3×3 convolution sees for each of its results: y [images, (side / stride)², 9, channels].
extern "C" __global__ void patches(const float* x, float* y, size_t count, uint32_t side, uint32_t stride, uint32_t channels) {
    Plane plane = {side, stride, channels};
    uint32_t out = plane.out();
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t channel = i % channels, k = i / channels % 9, pixel = i / channels / 9 % (out * out);
        const float* image = x + i / channels / 9 / (out * out) * side * side * channels;
        int row = int(pixel / out * stride) + int(k / 3) - plane.before();
        int column = int(pixel % out * stride) + int(k % 3) - plane.before();
        y[i] = plane.holds(row, column) ? image[plane.at(row, column, channel)] : 0.0f;
    }
}

extern "C" __global__ void patches_backward(
    const float* dy, float* dx, size_t count, uint32_t side, uint32_t stride, uint32_t channels
) {
    Plane plane = {side, stride, channels};
    int out = int(plane.out());
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t channel = i % channels, pixel = i / channels % (side * side);
        const float* image = dy + i / channels / (side * side) * out * out * 9 * channels;
        float sum = 0;
        for (int k = 0; k < 9; k++) {
            int row = plane.seen_by(int(pixel / side), k / 3), column = plane.seen_by(int(pixel % side), k % 3);
            if (row >= 0 && row < out && column >= 0 && column < out) {
                sum += image[(size_t(row * out + column) * 9 + k) * channels + channel];
            }
        }
        dx[i] = sum;
    }
}
