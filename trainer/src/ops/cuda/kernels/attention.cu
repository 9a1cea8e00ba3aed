// Attention over packed sequences that never writes its probabilities to memory (FlashAttention, arXiv 2205.14135, and
// FlashAttention-2, arXiv 2307.08691): keys pass by in tiles under a softmax that is corrected as it goes; the backward pass
// makes the probabilities anew from the logarithm of each row's sum. `qkv` is [rows, 3, heads, depth], without its bias [3, heads,
// depth], which may be null.
//
// A block has four warps. What stays (queries forward, keys in their own backward pass) is STAYING rows, STAYING / 4 of them a
// warp's; what passes is a lane's each.
#include "attention.cuh"

constexpr uint32_t STAYING = 16, PASSING = 32, OF_WARP = 4;
// Values of a row that a lane adds up: heads are at most 96 wide.
constexpr uint32_t OF_LANE = 3;

// Which rows a block of threads reads, and of which head.
template <typename T>
struct Heads {
    const T* values;
    const float* bias;
    uint32_t stride, offset, depth;

    // Copies a row with its bias (zeros where it is absent), `factor` times.
    __device__ __forceinline__ void load(float* to, bool present, uint32_t row, uint32_t i, float factor) const {
        float added = bias ? bias[offset + i] : 0.0f;
        *to = present ? (widened(values[size_t(row) * stride + offset + i]) + added) * factor : 0.0f;
    }
};

template <typename T>
__device__ __forceinline__ void attend(
    float* shared, const T* qkv, const float* bias, const QueryTile* tiles, T* y, float* logarithms, uint32_t heads,
    uint32_t depth, Dropout of_pass
) {
    float *queries = shared, *keys = queries + STAYING * depth, *values = keys + PASSING * (depth + 1);
    QueryTile tile = tiles[blockIdx.x];
    uint32_t head = blockIdx.y, hidden = heads * depth, stride = 3 * hidden;
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Heads<T> query = {qkv, bias, stride, head * depth, depth}, key = {qkv, bias, stride, hidden + head * depth, depth};
    Heads<T> value = {qkv, bias, stride, 2 * hidden + head * depth, depth};
    Dropout dropout = of_block(of_pass, tile.block, head);
    for (uint32_t i = threadIdx.x; i < STAYING * depth; i += blockDim.x) {
        query.load(queries + i, i / depth < tile.count, tile.first + i / depth, i % depth, 1.0f / sqrtf(depth));
    }
    float most[OF_WARP], sum[OF_WARP], out[OF_WARP][OF_LANE] = {};
    for (uint32_t r = 0; r < OF_WARP; r++) most[r] = -INFINITY, sum[r] = 0;
    uint32_t width = tile.context_rows + tile.rows, number = tile.first - tile.block;
    uint32_t end = tile.causal ? tile.context_rows + number + tile.count : width;
    for (uint32_t start = 0; start < end; start += PASSING) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < PASSING * depth; i += blockDim.x) {
            uint32_t j = i / depth, column = start + j;
            uint32_t row = column < tile.context_rows ? tile.context + column : tile.block + column - tile.context_rows;
            key.load(keys + j * (depth + 1) + i % depth, column < end, row, i % depth, 1.0f);
            value.load(values + i, column < end, row, i % depth, 1.0f);
        }
        __syncthreads();
        float score[OF_WARP] = {};
        for (uint32_t t = 0; t < depth; t++) {
            float by = keys[lane * (depth + 1) + t];
            for (uint32_t r = 0; r < OF_WARP; r++) score[r] += queries[(warp * OF_WARP + r) * depth + t] * by;
        }
        uint32_t column = start + lane;
        for (uint32_t r = 0; r < OF_WARP; r++) {
            uint32_t i = number + warp * OF_WARP + r;
            bool seen = column < end && (!tile.causal || column <= tile.context_rows + i);
            float largest = fmaxf(most[r], warp_max(seen ? score[r] : -INFINITY));
            float correction = expf(most[r] - largest), weight = seen ? expf(score[r] - largest) : 0.0f;
            most[r] = largest;
            sum[r] = sum[r] * correction + warp_sum(weight);
            score[r] = dropout.limit == 0xffffffffu ? weight : dropout(weight, i * width + column);
            for (uint32_t c = 0; c < OF_LANE; c++) out[r][c] *= correction;
        }
        for (uint32_t j = 0; j < PASSING; j++) {
            for (uint32_t r = 0; r < OF_WARP; r++) {
                float weight = __shfl_sync(ALL_LANES, score[r], j);
                for (uint32_t c = 0; c < OF_LANE && lane + c * WARP < depth; c++) {
                    out[r][c] += weight * values[j * depth + lane + c * WARP];
                }
            }
        }
    }
    for (uint32_t r = 0; r < OF_WARP; r++) {
        uint32_t i = warp * OF_WARP + r;
        if (i >= tile.count) continue;
        T* row = y + size_t(tile.first + i) * hidden + head * depth;
        for (uint32_t c = 0; c < OF_LANE && lane + c * WARP < depth; c++) put(row[lane + c * WARP], out[r][c] / sum[r]);
        if (lane == 0) logarithms[size_t(tile.first + i) * heads + head] = most[r] + logf(sum[r]);
    }
}

// delta[row, head] = Σ y · dy: what every gradient by a row's probabilities is measured from. A warp makes one.
template <typename T>
__device__ __forceinline__ void project(const T* y, const T* dy, float* delta, uint32_t count, uint32_t depth) {
    uint32_t lane = threadIdx.x % WARP, number = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (number >= count) return;
    float sum = 0;
    y += size_t(number) * depth, dy += size_t(number) * depth;
    for (uint32_t t = lane; t < depth; t += WARP) sum += widened(y[t]) * widened(dy[t]);
    sum = warp_sum(sum);
    if (lane == 0) delta[number] = sum;
}

// The gradient by the queries, into the first third of dqkv's columns.
template <typename T>
__device__ __forceinline__ void attend_queries_backward(
    float* shared, const T* qkv, const float* bias, const QueryTile* tiles, const T* dy, const float* logarithms,
    const float* delta, T* dqkv, uint32_t heads, uint32_t depth, Dropout of_pass
) {
    float *queries = shared, *gradients = queries + STAYING * depth;
    float *keys = gradients + STAYING * depth, *values = keys + PASSING * (depth + 1);
    QueryTile tile = tiles[blockIdx.x];
    uint32_t head = blockIdx.y, hidden = heads * depth, stride = 3 * hidden;
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Heads<T> query = {qkv, bias, stride, head * depth, depth}, key = {qkv, bias, stride, hidden + head * depth, depth};
    Heads<T> value = {qkv, bias, stride, 2 * hidden + head * depth, depth}, gradient = {dy, nullptr, hidden, head * depth, depth};
    Dropout dropout = of_block(of_pass, tile.block, head);
    float root = 1.0f / sqrtf(depth);
    for (uint32_t i = threadIdx.x; i < STAYING * depth; i += blockDim.x) {
        bool present = i / depth < tile.count;
        query.load(queries + i, present, tile.first + i / depth, i % depth, root);
        gradient.load(gradients + i, present, tile.first + i / depth, i % depth, 1.0f);
    }
    float logarithm[OF_WARP], projection[OF_WARP], out[OF_WARP][OF_LANE] = {};
    for (uint32_t r = 0; r < OF_WARP; r++) {
        uint32_t i = warp * OF_WARP + r;
        size_t at = size_t(tile.first + i) * heads + head;
        logarithm[r] = i < tile.count ? logarithms[at] : 0.0f;
        projection[r] = i < tile.count ? delta[at] : 0.0f;
    }
    uint32_t width = tile.context_rows + tile.rows, number = tile.first - tile.block;
    uint32_t end = tile.causal ? tile.context_rows + number + tile.count : width;
    for (uint32_t start = 0; start < end; start += PASSING) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < PASSING * depth; i += blockDim.x) {
            uint32_t j = i / depth, column = start + j;
            uint32_t row = column < tile.context_rows ? tile.context + column : tile.block + column - tile.context_rows;
            key.load(keys + j * (depth + 1) + i % depth, column < end, row, i % depth, 1.0f);
            value.load(values + j * (depth + 1) + i % depth, column < end, row, i % depth, 1.0f);
        }
        __syncthreads();
        float score[OF_WARP] = {}, by_weight[OF_WARP] = {};
        for (uint32_t t = 0; t < depth; t++) {
            float by_key = keys[lane * (depth + 1) + t], by_value = values[lane * (depth + 1) + t];
            for (uint32_t r = 0; r < OF_WARP; r++) {
                score[r] += queries[(warp * OF_WARP + r) * depth + t] * by_key;
                by_weight[r] += gradients[(warp * OF_WARP + r) * depth + t] * by_value;
            }
        }
        uint32_t column = start + lane;
        for (uint32_t r = 0; r < OF_WARP; r++) {
            uint32_t i = number + warp * OF_WARP + r;
            bool seen = column < end && warp * OF_WARP + r < tile.count && (!tile.causal || column <= tile.context_rows + i);
            if (dropout.limit != 0xffffffffu) by_weight[r] = dropout(by_weight[r], i * width + column);
            score[r] = seen ? expf(score[r] - logarithm[r]) * (by_weight[r] - projection[r]) * root : 0.0f;
        }
        for (uint32_t j = 0; j < PASSING; j++) {
            for (uint32_t r = 0; r < OF_WARP; r++) {
                float weight = __shfl_sync(ALL_LANES, score[r], j);
                for (uint32_t c = 0; c < OF_LANE && lane + c * WARP < depth; c++) {
                    out[r][c] += weight * keys[j * (depth + 1) + lane + c * WARP];
                }
            }
        }
    }
    for (uint32_t r = 0; r < OF_WARP; r++) {
        uint32_t i = warp * OF_WARP + r;
        if (i >= tile.count) continue;
        T* row = dqkv + size_t(tile.first + i) * stride + head * depth;
        for (uint32_t c = 0; c < OF_LANE && lane + c * WARP < depth; c++) put(row[lane + c * WARP], out[r][c]);
    }
}

// The gradients by keys and values, into the other two thirds: every row that sees a key passes by it.
template <typename T>
__device__ __forceinline__ void attend_keys_backward(
    float* shared, const T* qkv, const float* bias, const KeyTile* tiles, const Segment* segments, const T* dy,
    const float* logarithms, const float* delta, T* dqkv, uint32_t heads, uint32_t depth, Dropout of_pass
) {
    float *keys = shared, *values = keys + STAYING * depth;
    float *queries = values + STAYING * depth, *gradients = queries + PASSING * (depth + 1);
    KeyTile tile = tiles[blockIdx.x];
    uint32_t head = blockIdx.y, hidden = heads * depth, stride = 3 * hidden;
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Heads<T> query = {qkv, bias, stride, head * depth, depth}, key = {qkv, bias, stride, hidden + head * depth, depth};
    Heads<T> value = {qkv, bias, stride, 2 * hidden + head * depth, depth}, gradient = {dy, nullptr, hidden, head * depth, depth};
    float root = 1.0f / sqrtf(depth);
    for (uint32_t i = threadIdx.x; i < STAYING * depth; i += blockDim.x) {
        bool present = i / depth < tile.count;
        key.load(keys + i, present, tile.first + i / depth, i % depth, root);
        value.load(values + i, present, tile.first + i / depth, i % depth, 1.0f);
    }
    float by_key[OF_WARP][OF_LANE] = {}, by_value[OF_WARP][OF_LANE] = {};
    for (uint32_t number = tile.segment; number < tile.segment + tile.segments; number++) {
        Segment segment = segments[number];
        Dropout dropout = of_block(of_pass, segment.block, head);
        // Rows before the first that sees a key of the tile need not pass.
        for (uint32_t start = segment.causal ? segment.first_seen : 0; start < segment.rows; start += PASSING) {
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < PASSING * depth; i += blockDim.x) {
                uint32_t j = i / depth, at = j * (depth + 1) + i % depth;
                bool present = start + j < segment.rows;
                query.load(queries + at, present, segment.block + start + j, i % depth, 1.0f);
                gradient.load(gradients + at, present, segment.block + start + j, i % depth, 1.0f);
            }
            __syncthreads();
            uint32_t i = start + lane;
            bool present = i < segment.rows;
            size_t at = size_t(segment.block + i) * heads + head;
            float logarithm = present ? logarithms[at] : 0.0f, projection = present ? delta[at] : 0.0f;
            float score[OF_WARP] = {}, by_weight[OF_WARP] = {};
            for (uint32_t t = 0; t < depth; t++) {
                float by_query = queries[lane * (depth + 1) + t], by_gradient = gradients[lane * (depth + 1) + t];
                for (uint32_t r = 0; r < OF_WARP; r++) {
                    score[r] += keys[(warp * OF_WARP + r) * depth + t] * by_query;
                    by_weight[r] += values[(warp * OF_WARP + r) * depth + t] * by_gradient;
                }
            }
            for (uint32_t r = 0; r < OF_WARP; r++) {
                uint32_t k = warp * OF_WARP + r, index = i * segment.width + segment.column + k;
                bool seen = present && (!segment.causal || i >= segment.first_seen + k);
                float weight = seen ? expf(score[r] - logarithm) : 0.0f, kept = weight;
                if (dropout.limit != 0xffffffffu) {
                    kept = dropout(weight, index);
                    by_weight[r] = dropout(by_weight[r], index);
                }
                score[r] = weight * (by_weight[r] - projection) * root;
                by_weight[r] = kept;
            }
            for (uint32_t j = 0; j < PASSING; j++) {
                for (uint32_t r = 0; r < OF_WARP; r++) {
                    float of_score = __shfl_sync(ALL_LANES, score[r], j), kept = __shfl_sync(ALL_LANES, by_weight[r], j);
                    for (uint32_t c = 0; c < OF_LANE && lane + c * WARP < depth; c++) {
                        by_key[r][c] += of_score * queries[j * (depth + 1) + lane + c * WARP];
                        by_value[r][c] += kept * gradients[j * (depth + 1) + lane + c * WARP];
                    }
                }
            }
        }
    }
    for (uint32_t r = 0; r < OF_WARP; r++) {
        uint32_t k = warp * OF_WARP + r;
        if (k >= tile.count) continue;
        T* row = dqkv + size_t(tile.first + k) * stride + hidden + head * depth;
        for (uint32_t c = 0; c < OF_LANE && lane + c * WARP < depth; c++) {
            put(row[lane + c * WARP], by_key[r][c]);
            put(row[hidden + lane + c * WARP], by_value[r][c]);
        }
    }
}

#define OF_TYPE(T, suffix)                                                                                                      \
    extern "C" __global__ void attention##suffix(                                                                               \
        const T* qkv, const float* bias, const QueryTile* tiles, T* y, float* logarithms, uint32_t heads, uint32_t depth,       \
        const uint32_t* seed, uint32_t limit, float scale                                                                       \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        attend(shared, qkv, bias, tiles, y, logarithms, heads, depth, seeded(seed, limit, scale));                              \
    }                                                                                                                           \
    extern "C" __global__ void attention_delta##suffix(                                                                         \
        const T* y, const T* dy, float* delta, uint32_t count, uint32_t depth                                                   \
    ) {                                                                                                                         \
        project(y, dy, delta, count, depth);                                                                                    \
    }                                                                                                                           \
    extern "C" __global__ void attention_queries_backward##suffix(                                                              \
        const T* qkv, const float* bias, const QueryTile* tiles, const T* dy, const float* logarithms, const float* delta,      \
        T* dqkv, uint32_t heads, uint32_t depth, const uint32_t* seed, uint32_t limit, float scale                              \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        attend_queries_backward(shared, qkv, bias, tiles, dy, logarithms, delta, dqkv, heads, depth, dropout);                  \
    }                                                                                                                           \
    extern "C" __global__ void attention_keys_backward##suffix(                                                                 \
        const T* qkv, const float* bias, const KeyTile* tiles, const Segment* segments, const T* dy, const float* logarithms,   \
        const float* delta, T* dqkv, uint32_t heads, uint32_t depth, const uint32_t* seed, uint32_t limit, float scale          \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        attend_keys_backward(shared, qkv, bias, tiles, segments, dy, logarithms, delta, dqkv, heads, depth, dropout);           \
    }

OF_TYPE(float, )
OF_TYPE(bf16, _bf16)
#undef OF_TYPE
