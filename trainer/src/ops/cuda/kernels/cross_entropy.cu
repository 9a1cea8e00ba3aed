// Softmax cross-entropy of rows of logits, which become their own gradients.
#include "device.cuh"

// A block takes row blockIdx.x of `logits` [rows, classes] (bias not yet added): losses[row] becomes its cross-entropy with
// targets[row], smoothed over all classes, times weights[row] (1 where null); the logits become the gradient of that times
// `share`.
extern "C" __global__ void cross_entropy_rows(
    float* logits, const float* bias, const uint32_t* targets, const float* weights, float* losses, uint32_t classes,
    float smoothing, float share
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
    float weight = weights ? weights[blockIdx.x] : 1.0f, log_total = logf(total) + largest;
    uint32_t target = targets[blockIdx.x];
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = weight * ((1.0f - smoothing) * (log_total - row[target]) + smoothing * (log_total - sum / classes));
    }
    __syncthreads();
    float scale = weight * share / total, floor = weight * share * smoothing / classes;
    for (uint32_t i = threadIdx.x; i < classes; i += blockDim.x) {
        float gradient = expf(row[i] - largest) * scale - floor;
        row[i] = i == target ? gradient - weight * share * (1.0f - smoothing) : gradient;
    }
}
