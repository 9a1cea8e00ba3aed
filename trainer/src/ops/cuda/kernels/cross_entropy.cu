// Softmax cross-entropy of rows of logits, which become their own gradients.
#include "device.cuh"

// A row's target, how many times its cross-entropy counts, what it counts in the sum of all means, and what part of it is smoothed over
// all classes.
struct Predicted {
    uint32_t target;
    float weight, share, smoothing;
};

// A block takes row blockIdx.x of `logits` [rows, classes] (bias not yet added): losses[row] becomes its cross-entropy, times its
// weight; the logits become the gradient of that in the sum of all means.
extern "C" __global__ void cross_entropy_rows(
    float* logits, const float* bias, const Predicted* rows, float* losses, uint32_t classes
) {
    SHARED(float, partial);
    float* row = logits + size_t(blockIdx.x) * classes;
    float most = -INFINITY, sum = 0, exponentials = 0;
    for (uint32_t i = threadIdx.x; i < classes; i += blockDim.x) {
        float value = row[i] + bias[i];
        row[i] = value;
        sum += value;
        // The exponentials are counted from the largest value so far.
        if (value > most) {
            exponentials *= expf(most - value);
            most = value;
        }
        exponentials += expf(value - most);
    }
    float largest = block_max(most, partial);
    // A thread without a value holds the empty sum.
    float total = block_sum(exponentials == 0.0f ? 0.0f : exponentials * expf(most - largest), partial);
    sum = block_sum(sum, partial);
    Predicted of = rows[blockIdx.x];
    float smoothing = of.smoothing, log_total = logf(total) + largest;
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = of.weight * ((1.0f - smoothing) * (log_total - row[of.target]) + smoothing * (log_total - sum / classes));
    }
    __syncthreads();
    float scale = of.share / total, floor = of.share * smoothing / classes;
    for (uint32_t i = threadIdx.x; i < classes; i += blockDim.x) {
        float gradient = expf(row[i] - largest) * scale - floor;
        row[i] = i == of.target ? gradient - of.share * (1.0f - smoothing) : gradient;
    }
}

// Losses that make one mean: where they begin and end, one over their number, and how many times the mean counts.
struct Mean {
    uint32_t first, end;
    float share, factor;
};

// Means of the losses of each part, and the sum of these means, in one block.
extern "C" __global__ void cross_entropy_parts(const float* losses, const Mean* parts, float* means, float* sum, uint32_t count) {
    SHARED(float, partial);
    float all = 0;
    for (uint32_t number = 0; number < count; number++) {
        Mean part = parts[number];
        float mean = 0;
        for (uint32_t i = part.first + threadIdx.x; i < part.end; i += blockDim.x) mean += losses[i];
        mean = block_sum(mean, partial) * part.share;
        if (threadIdx.x == 0) means[number] = mean;
        all += part.factor * mean;
    }
    if (threadIdx.x == 0) *sum = all;
}
