// 3×3 depthwise convolution with ReLU6 over square images [images, side², channels]; weight [9, channels].
#include "device.cuh"

// Stride 1 pads one pixel all round, stride 2 one at bottom and right.
struct Plane {
    uint32_t side, stride, channels;

    __device__ __forceinline__ uint32_t out() const { return side / stride; }
    __device__ __forceinline__ int before() const { return stride == 1 ? 1 : 0; }
    __device__ __forceinline__ size_t at(int row, int column, uint32_t channel) const {
        return size_t(row * int(side) + column) * channels + channel;
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
            int row = int(pixel / side) + plane.before() - k / 3, column = int(pixel % side) + plane.before() - k % 3;
            if (row < 0 || column < 0 || row % int(stride) != 0 || column % int(stride) != 0) continue;
            row /= int(stride);
            column /= int(stride);
            if (row < out && column < out) {
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
