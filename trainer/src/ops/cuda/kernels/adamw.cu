// AdamW over all tensors at once, with clipping by the global norm that never leaves the device.
#include "device.cuh"

// A piece of one tensor: blockIdx.x is its number.
struct Piece {
    float *weights, *first, *second;
    const float* gradient;
    uint32_t count;
    float rate, decay;
    uint32_t unused;
};

// Four values, which are read and written at one time.
struct alignas(16) Four {
    float at[4];
};

__device__ __forceinline__ Four& four(float* of, uint32_t i) { return *reinterpret_cast<Four*>(of + i); }

// sums[piece] = Σ gradient²
extern "C" __global__ void square_sums(const Piece* pieces, float* sums) {
    SHARED(float, partial);
    Piece piece = pieces[blockIdx.x];
    float sum = 0;
    uint32_t by_fours = in_sixteens(piece.gradient) ? piece.count / 4 * 4 : 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x * 4; i < by_fours; i += blockDim.x * 4) {
        Four gradient = *reinterpret_cast<const Four*>(piece.gradient + i);
        for (float value : gradient.at) sum += value * value;
    }
    for (uint32_t i = by_fours + threadIdx.x; i < piece.count; i += blockDim.x) sum += piece.gradient[i] * piece.gradient[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// norm[0] = √ Σ sums, in one block. Where that is finite there is an update: `progress` holds how many there were, and what they make
// of the moments' means, 1 / (1 − βᵗ).
extern "C" __global__ void root_of_sum(
    const float* sums, float* norm, float* progress, uint32_t count, float beta1, float beta2
) {
    SHARED(float, partial);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x != 0) return;
    norm[0] = sqrtf(sum);
    if (!isfinite(norm[0])) return;
    progress[0] += 1.0f;
    progress[1] = (float)(1.0 / (1.0 - pow((double)beta1, (double)progress[0])));
    progress[2] = (float)(1.0 / (1.0 - pow((double)beta2, (double)progress[0])));
}

// One update. A norm that is not finite changes nothing; one above `clip` scales the gradient down to it.
extern "C" __global__ void adamw(
    const Piece* pieces, const float* norm, const float* progress, float clip, float beta1, float beta2, float eps
) {
    if (!isfinite(norm[0])) return;
    float correction1 = progress[1], correction2 = progress[2];
    Piece piece = pieces[blockIdx.x];
    float scale = norm[0] > clip ? clip / norm[0] : 1.0f;
    auto update = [&](float& weight, float& first, float& second, float gradient) {
        gradient *= scale;
        first = beta1 * first + (1.0f - beta1) * gradient;
        second = beta2 * second + (1.0f - beta2) * gradient * gradient;
        weight = weight * (1.0f - piece.rate * piece.decay) - piece.rate * (first * correction1) / (sqrtf(second * correction2) + eps);
    };
    bool whole = in_sixteens(piece.weights) && in_sixteens(piece.first) && in_sixteens(piece.second) && in_sixteens(piece.gradient);
    uint32_t by_fours = whole ? piece.count / 4 * 4 : 0;
    for (uint32_t i = threadIdx.x * 4; i < by_fours; i += blockDim.x * 4) {
        // All is read before anything is written, which might, for all the compiler knows, be what is read next.
        Four weights = four(piece.weights, i), first = four(piece.first, i), second = four(piece.second, i);
        Four gradient = *reinterpret_cast<const Four*>(piece.gradient + i);
        for (uint32_t e = 0; e < 4; e++) update(weights.at[e], first.at[e], second.at[e], gradient.at[e]);
        four(piece.weights, i) = weights;
        four(piece.first, i) = first;
        four(piece.second, i) = second;
    }
    for (uint32_t i = by_fours + threadIdx.x; i < piece.count; i += blockDim.x) {
        update(piece.weights[i], piece.first[i], piece.second[i], piece.gradient[i]);
    }
}
