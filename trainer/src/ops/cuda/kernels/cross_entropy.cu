// Softmax cross-entropy of rows of logits, and the gradient by these.
#include "device.cuh"

// A row's target, how many times its cross-entropy counts, what it counts in the sum of all means, and what part of it is smoothed over
// all classes.
struct Predicted {
    uint32_t target;
    float weight, share, smoothing;
};

// A block takes row blockIdx.x of `logits` (bias not yet added), which has `classes` of them and begins `stride`, a multiple of FEW, after
// the one before: losses[row] becomes its cross-entropy, times its weight, and the row of `gradients`, which may be where the logits are,
// the gradient by these of that in the sum of all means, with zeros behind. A thread has FEW columns at one time.
template <typename T>
__device__ __forceinline__ void cross_entropy(
    const float* logits, const float* bias, const Predicted* rows, float* losses, T* gradients, uint32_t classes, float* partial
) {
    uint32_t stride = (classes + FEW - 1) / FEW * FEW;
    const float* row = logits + size_t(blockIdx.x) * stride;
    T* to = gradients + size_t(blockIdx.x) * stride;
    Predicted of = rows[blockIdx.x];
    float most = -INFINITY, sum = 0, exponentials = 0, some[FEW], others[FEW];
    for (uint32_t i = threadIdx.x * FEW; i < classes; i += blockDim.x * FEW) {
        uint32_t count = min(FEW, classes - i);
        read_few(row + i, count, some);
        read_few(bias + i, count, others);
        // The exponentials are counted from the largest value so far.
        float largest = most;
        for (uint32_t e = 0; e < FEW; e++) {
            some[e] += others[e];
            sum += some[e];
            if (e >= count) some[e] = -INFINITY;
            largest = fmaxf(largest, some[e]);
        }
        exponentials *= expf(most - largest);
        for (uint32_t e = 0; e < FEW; e++) exponentials += expf(some[e] - largest);
        most = largest;
    }
    float largest = block_max(most, partial);
    // A thread without a value holds the empty sum.
    float total = block_sum(exponentials == 0.0f ? 0.0f : exponentials * expf(most - largest), partial);
    sum = block_sum(sum, partial);
    float smoothing = of.smoothing, log_total = logf(total) + largest;
    if (threadIdx.x == 0) {
        float at_target = row[of.target] + bias[of.target];
        losses[blockIdx.x] = of.weight * ((1.0f - smoothing) * (log_total - at_target) + smoothing * (log_total - sum / classes));
    }
    // The target's logit was read.
    __syncthreads();
    float scale = of.share / total, floor = of.share * smoothing / classes;
    for (uint32_t i = threadIdx.x * FEW; i < classes; i += blockDim.x * FEW) {
        uint32_t count = min(FEW, classes - i);
        read_few(row + i, count, some);
        read_few(bias + i, count, others);
        for (uint32_t e = 0; e < FEW; e++) {
            some[e] = expf(some[e] + others[e] - largest) * scale - floor;
            if (i + e == of.target) some[e] -= of.share * (1.0f - smoothing);
            if (e >= count) some[e] = 0.0f;
        }
        store(to + i, some);
    }
}

extern "C" __global__ void cross_entropy_rows(
    const float* logits, const float* bias, const Predicted* rows, float* losses, float* gradients, uint32_t classes
) {
    SHARED(float, partial);
    cross_entropy(logits, bias, rows, losses, gradients, classes, partial);
}

extern "C" __global__ void cross_entropy_rows_bf16(
    const float* logits, const float* bias, const Predicted* rows, float* losses, bf16* gradients, uint32_t classes
) {
    SHARED(float, partial);
    cross_entropy(logits, bias, rows, losses, gradients, classes, partial);
}

// Losses that make one mean: where they begin and end, one over their number, and how many times the mean counts.
struct Mean {
    uint32_t first, end;
    float share, factor;
};

// The sum of the parts' means, each as often as it counts, and then the means, in one block.
extern "C" __global__ void cross_entropy_parts(const float* losses, const Mean* parts, float* found, uint32_t count) {
    SHARED(float, partial);
    float all = 0;
    for (uint32_t number = 0; number < count; number++) {
        Mean part = parts[number];
        float mean = 0;
        for (uint32_t i = part.first + threadIdx.x; i < part.end; i += blockDim.x) mean += losses[i];
        mean = block_sum(mean, partial) * part.share;
        if (threadIdx.x == 0) found[1 + number] = mean;
        all += part.factor * mean;
    }
    if (threadIdx.x == 0) found[0] = all;
}
