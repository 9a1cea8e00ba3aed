// 3×3 convolutions over square images [images, side², channels]: depthwise ones with ReLU6, weight [9, channels], and what others see.
// Activations are f32 or bf16, weights and their gradients f32. Counts of pixels and of what threads share out are below 2³².
#include "device.cuh"

// Stride 1 pads one pixel all round, stride 2 one at bottom and right.
struct Plane {
    uint32_t side, stride, channels;

    __device__ __forceinline__ uint32_t out() const { return side / stride; }
    __device__ __forceinline__ int before() const { return stride == 1 ? 1 : 0; }
    __device__ __forceinline__ int first_seen(uint32_t at, uint32_t k) const { return int(at * stride + k) - before(); }
    __device__ __forceinline__ bool holds(int row, int column) const {
        return row >= 0 && column >= 0 && row < int(side) && column < int(side);
    }
    // The row (or column) of the result that sees row `at` in place `k` of the kernel, or a negative number.
    __device__ __forceinline__ int seen_by(uint32_t at, uint32_t k) const {
        int first = int(at) + before() - int(k);
        return first < 0 || first % int(stride) != 0 || first / int(stride) >= int(out()) ? -1 : first / int(stride);
    }
};

// A pixel of an image that is `side` pixels wide.
struct Pixel {
    uint32_t image, row, column;

    __device__ __forceinline__ Pixel(uint32_t number, uint32_t side)
        : image(number / (side * side)), row(number / side % side), column(number % side) {}
    // The first value of a pixel of the same image, in another plane of that width.
    __device__ __forceinline__ size_t at(int row, int column, uint32_t side, uint32_t channels) const {
        return (size_t(image) * side * side + size_t(row) * side + column) * channels;
    }
};

// FEW channels, of the ones that threads share out in turns.
struct Channels {
    uint32_t turn, first, count;

    __device__ __forceinline__ Channels(uint32_t number, uint32_t channels) {
        uint32_t spans = (channels + FEW - 1) / FEW;
        turn = number / spans;
        first = (number - turn * spans) * FEW;
        count = min(FEW, channels - first);
    }
};

#define FOR_EACH(i, count) \
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += gridDim.x * blockDim.x)

template <typename T>
__device__ __forceinline__ void depthwise(const T* x, const float* weight, const float* bias, T* y, uint32_t count, Plane plane) {
    FOR_EACH(i, count) {
        Channels own(i, plane.channels);
        Pixel pixel(own.turn, plane.out());
        float sum[FEW], some[FEW], by[FEW];
        read_few(bias + own.first, own.count, sum);
        for (uint32_t k = 0; k < 9; k++) {
            int row = plane.first_seen(pixel.row, k / 3), column = plane.first_seen(pixel.column, k % 3);
            if (!plane.holds(row, column)) continue;
            read_few(x + pixel.at(row, column, plane.side, plane.channels) + own.first, own.count, some);
            read_few(weight + k * plane.channels + own.first, own.count, by);
            for (uint32_t e = 0; e < FEW; e++) sum[e] += some[e] * by[e];
        }
        for (uint32_t e = 0; e < FEW; e++) sum[e] = fminf(fmaxf(sum[e], 0.0f), 6.0f);
        write_few(y + size_t(own.turn) * plane.channels + own.first, own.count, sum);
    }
}

// dx of every input pixel, from the results that saw it; `gradient` is dy where y lies between 0 and 6.
template <typename T>
__device__ __forceinline__ void depthwise_input_backward(
    const T* gradient, const float* weight, T* dx, uint32_t count, Plane plane
) {
    FOR_EACH(i, count) {
        Channels own(i, plane.channels);
        Pixel pixel(own.turn, plane.side);
        float sum[FEW] = {}, some[FEW], by[FEW];
        for (uint32_t k = 0; k < 9; k++) {
            int row = plane.seen_by(pixel.row, k / 3), column = plane.seen_by(pixel.column, k % 3);
            if (row < 0 || column < 0) continue;
            read_few(gradient + pixel.at(row, column, plane.out(), plane.channels) + own.first, own.count, some);
            read_few(weight + k * plane.channels + own.first, own.count, by);
            for (uint32_t e = 0; e < FEW; e++) sum[e] += some[e] * by[e];
        }
        write_few(dx + size_t(own.turn) * plane.channels + own.first, own.count, sum);
    }
}

// Shares of the gradients by weight and bias: each row of `partial` [count / spans, 10, channels] is that of `each` of the results'
// `pixels`. Ten rows of channels: the nine positions of the kernel, then the bias.
template <typename T>
__device__ __forceinline__ void depthwise_weight_backward(
    const T* x, const T* gradient, float* partial, uint32_t count, uint32_t pixels, uint32_t each, Plane plane
) {
    FOR_EACH(i, count) {
        Channels own(i, plane.channels);
        uint32_t end = min((own.turn + 1) * each, pixels);
        float sum[10][FEW] = {}, some[FEW], by[FEW];
        for (uint32_t number = own.turn * each; number < end; number++) {
            Pixel pixel(number, plane.out());
            read_few(gradient + size_t(number) * plane.channels + own.first, own.count, by);
#pragma unroll
            for (uint32_t k = 0; k < 9; k++) {
                int row = plane.first_seen(pixel.row, k / 3), column = plane.first_seen(pixel.column, k % 3);
                if (!plane.holds(row, column)) continue;
                read_few(x + pixel.at(row, column, plane.side, plane.channels) + own.first, own.count, some);
                for (uint32_t e = 0; e < FEW; e++) sum[k][e] += some[e] * by[e];
            }
            for (uint32_t e = 0; e < FEW; e++) sum[9][e] += by[e];
        }
#pragma unroll
        for (uint32_t k = 0; k < 10; k++) {
            write_few(partial + (size_t(own.turn) * 10 + k) * plane.channels + own.first, own.count, sum[k]);
        }
    }
}

// What a 3×3 convolution sees for each of its results: y [images, (side / stride)², 9, channels].
template <typename T>
__device__ __forceinline__ void all_patches(const T* x, T* y, uint32_t count, Plane plane) {
    FOR_EACH(i, count) {
        uint32_t k = i % 9;
        Pixel pixel(i / 9, plane.out());
        int row = plane.first_seen(pixel.row, k / 3), column = plane.first_seen(pixel.column, k % 3);
        const T* from = plane.holds(row, column) ? x + pixel.at(row, column, plane.side, plane.channels) : nullptr;
        T* to = y + size_t(i) * plane.channels;
        for (uint32_t channel = 0; channel < plane.channels; channel++) put(to[channel], from ? widened(from[channel]) : 0.0f);
    }
}

template <typename T>
__device__ __forceinline__ void all_patches_backward(const T* dy, T* dx, uint32_t count, Plane plane) {
    FOR_EACH(i, count) {
        Pixel pixel(i, plane.side);
        for (uint32_t channel = 0; channel < plane.channels; channel++) {
            float sum = 0;
            for (uint32_t k = 0; k < 9; k++) {
                int row = plane.seen_by(pixel.row, k / 3), column = plane.seen_by(pixel.column, k % 3);
                if (row < 0 || column < 0) continue;
                sum += widened(dy[pixel.at(row, column, plane.out(), 9 * plane.channels) + k * plane.channels + channel]);
            }
            put(dx[size_t(i) * plane.channels + channel], sum);
        }
    }
}

#define OF_TYPE(T, suffix)                                                                                                      \
    extern "C" __global__ void depthwise_relu6##suffix(                                                                         \
        const T* x, const float* weight, const float* bias, T* y, uint32_t count, uint32_t side, uint32_t stride,               \
        uint32_t channels                                                                                                       \
    ) {                                                                                                                         \
        depthwise(x, weight, bias, y, count, {side, stride, channels});                                                         \
    }                                                                                                                           \
    extern "C" __global__ void depthwise_relu6_input_backward##suffix(                                                          \
        const T* gradient, const float* weight, T* dx, uint32_t count, uint32_t side, uint32_t stride, uint32_t channels        \
    ) {                                                                                                                         \
        depthwise_input_backward(gradient, weight, dx, count, {side, stride, channels});                                        \
    }                                                                                                                           \
    extern "C" __global__ void depthwise_relu6_weight_backward##suffix(                                                         \
        const T* x, const T* gradient, float* partial, uint32_t count, uint32_t pixels, uint32_t each, uint32_t side,           \
        uint32_t stride, uint32_t channels                                                                                      \
    ) {                                                                                                                         \
        depthwise_weight_backward(x, gradient, partial, count, pixels, each, {side, stride, channels});                         \
    }                                                                                                                           \
    extern "C" __global__ void patches##suffix(                                                                                 \
        const T* x, T* y, uint32_t count, uint32_t side, uint32_t stride, uint32_t channels                                     \
    ) {                                                                                                                         \
        all_patches(x, y, count, {side, stride, channels});                                                                     \
    }                                                                                                                           \
    extern "C" __global__ void patches_backward##suffix(                                                                        \
        const T* dy, T* dx, uint32_t count, uint32_t side, uint32_t stride, uint32_t channels                                   \
    ) {                                                                                                                         \
        all_patches_backward(dy, dx, count, {side, stride, channels});                                                          \
    }

OF_TYPE(float, )
OF_TYPE(bf16, _bf16)
#undef OF_TYPE
#undef FOR_EACH
