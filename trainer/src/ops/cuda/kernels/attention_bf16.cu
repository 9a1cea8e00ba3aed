// Attention as in attention.cu, its products on tensor cores: factors in bf16, sums in f32.
//
// A block has four warps, each with 16 rows that stay (queries forward and in their own backward pass, keys in theirs); PASSING
// rows at a time pass by all of them. Every fragment's sums are whole rows of a product with 16 columns, which go through shared
// memory to become probabilities: two lanes have a row, eight columns each. Keys pass twice in the forward pass, first for each
// row's sum of exponentials; the fragments that add up values are never corrected then.
#include "attention.cuh"

#ifdef UNIMO_EMULATED
#include "../emulation/mma.h"
#else
#include <mma.h>
#endif

namespace tensor {

using namespace nvcuda::wmma;

constexpr uint32_t SIDE = 16, WARPS = 4, STAYING = WARPS * SIDE, PASSING = 32;
// From one row to the next in shared memory; a little more than a row, so that the rows begin in different banks.
constexpr uint32_t PITCH_OF_SUMS = SIDE + 4, PITCH_OF_SHARES = SIDE + 8;
constexpr uint32_t OF_LANE = SIDE / 2;
static_assert(OF_LANE == FEW, "a lane writes what it has at one time");

// [16 rows, 16 of depth], the transpose of [16 rows, 16 of depth], and [16 rows, 16 of depth] to be added up over its rows.
using Rows = fragment<matrix_a, SIDE, SIDE, SIDE, bf16, row_major>;
using Turned = fragment<matrix_b, SIDE, SIDE, SIDE, bf16, col_major>;
using Added = fragment<matrix_b, SIDE, SIDE, SIDE, bf16, row_major>;
using Sums = fragment<accumulator, SIDE, SIDE, SIDE, float>;

// Rows of a head; sixteen bytes at a time are read, all of which begin in such.
template <uint32_t DEPTH>
struct Head {
    static constexpr uint32_t PITCH = DEPTH + FEW;
    const bf16* values;
    uint32_t stride, offset;

    // The block's threads copy `count` rows, row j from place(j); zeros where that is ABSENT.
    template <typename Place>
    __device__ __forceinline__ void load(bf16* to, uint32_t count, Place place) const {
        for (uint32_t i = threadIdx.x; i < count * (DEPTH / FEW); i += blockDim.x) {
            uint32_t j = i / (DEPTH / FEW), t = i % (DEPTH / FEW) * FEW, row = place(j);
            uint4 few = {0, 0, 0, 0};
            if (row != ABSENT) few = *reinterpret_cast<const uint4*>(values + size_t(row) * stride + offset + t);
            *reinterpret_cast<uint4*>(to + j * PITCH + t) = few;
        }
    }

    static constexpr uint32_t ABSENT = 0xffffffffu;
};

// Which head a block of threads works on, and of its tile's rows what a thread has: row `own` of the warp's, OF_LANE columns of
// every product from `first` on.
template <uint32_t DEPTH>
struct Work {
    uint32_t head = blockIdx.y, heads, hidden = heads * DEPTH, stride = 3 * hidden;
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = lane / 2, first = lane % 2 * OF_LANE;
    float root = 1.0f / sqrtf(DEPTH);

    __device__ __forceinline__ explicit Work(uint32_t heads) : heads(heads) {}

    // Queries, keys or values of `qkv`: part 0, 1 or 2.
    __device__ __forceinline__ Head<DEPTH> part(const bf16* qkv, uint32_t number) const {
        return {qkv, stride, number * hidden + head * DEPTH};
    }

    __device__ __forceinline__ Head<DEPTH> gradient(const bf16* dy) const { return {dy, hidden, head * DEPTH}; }
};

// sums[16, 16] = rows[16, DEPTH] · others[16, DEPTH]ᵀ
template <uint32_t DEPTH>
__device__ __forceinline__ void multiply(float* sums, const bf16* rows, const bf16* others) {
    Sums made;
    fill_fragment(made, 0.0f);
#pragma unroll
    for (uint32_t t = 0; t < DEPTH; t += SIDE) {
        Rows a;
        Turned b;
        load_matrix_sync(a, rows + t, Head<DEPTH>::PITCH);
        load_matrix_sync(b, others + t, Head<DEPTH>::PITCH);
        mma_sync(made, a, b, made);
    }
    store_matrix_sync(sums, made, PITCH_OF_SUMS, mem_row_major);
}

// out[16, DEPTH] += shares[16, 16] · rows[16, DEPTH]
template <uint32_t DEPTH>
__device__ __forceinline__ void add_shares(Sums (&out)[DEPTH / SIDE], const bf16* shares, const bf16* rows) {
    Rows a;
    load_matrix_sync(a, shares, PITCH_OF_SHARES);
#pragma unroll
    for (uint32_t part = 0; part < DEPTH / SIDE; part++) {
        Added b;
        load_matrix_sync(b, rows + part * SIDE, Head<DEPTH>::PITCH);
        mma_sync(out[part], a, b, out[part]);
    }
}

// The first `count` rows of out[16, DEPTH] to rows of `stride` values, by way of the warp's `sums`.
template <uint32_t DEPTH>
__device__ __forceinline__ void write_rows(bf16* to, uint32_t stride, uint32_t count, Sums (&out)[DEPTH / SIDE], float* sums) {
    uint32_t lane = threadIdx.x % WARP, own = lane / 2, first = lane % 2 * OF_LANE;
#pragma unroll
    for (uint32_t part = 0; part < DEPTH / SIDE; part++) {
        __syncwarp();
        store_matrix_sync(sums, out[part], PITCH_OF_SUMS, mem_row_major);
        __syncwarp();
        float few[FEW];
        for (uint32_t e = 0; e < FEW; e++) few[e] = sums[own * PITCH_OF_SUMS + first + e];
        write_few(to + size_t(own) * stride + part * SIDE + first, own < count ? FEW : 0, few);
    }
}

template <uint32_t DEPTH>
__device__ __forceinline__ void clear(Sums (&out)[DEPTH / SIDE]) {
#pragma unroll
    for (uint32_t part = 0; part < DEPTH / SIDE; part++) fill_fragment(out[part], 0.0f);
}

// Which columns a query tile's rows see, and where these lie.
struct Seen {
    QueryTile tile;
    uint32_t number, width, end;

    __device__ __forceinline__ explicit Seen(const QueryTile& tile)
        : tile(tile), number(tile.first - tile.block), width(tile.context_rows + tile.rows),
          end(tile.causal ? tile.context_rows + number + tile.count : width) {}

    __device__ __forceinline__ uint32_t row_of(uint32_t column) const {
        if (column >= end) return 0xffffffffu;
        return column < tile.context_rows ? tile.context + column : tile.block + column - tile.context_rows;
    }

    // Whether row i of the block sees a column.
    __device__ __forceinline__ bool sees(uint32_t i, uint32_t column) const {
        return column < end && (!tile.causal || column <= tile.context_rows + i);
    }

    __device__ __forceinline__ uint32_t query(uint32_t j) const { return j < tile.count ? tile.first + j : 0xffffffffu; }
};

template <uint32_t DEPTH>
__device__ __forceinline__ void forward(
    bf16* shared, const bf16* qkv, const QueryTile* tiles, bf16* y, float* logarithms, uint32_t heads, Dropout of_pass
) {
    constexpr uint32_t PITCH = Head<DEPTH>::PITCH;
    Work<DEPTH> work(heads);
    uint32_t warp = work.warp, own = work.own, first = work.first;
    bf16 *queries = shared, *keys = queries + STAYING * PITCH, *values = keys + PASSING * PITCH;
    bf16* shares = values + PASSING * PITCH + warp * SIDE * PITCH_OF_SHARES;
    float* sums = reinterpret_cast<float*>(values + PASSING * PITCH + WARPS * SIDE * PITCH_OF_SHARES);
    sums += warp * SIDE * PITCH_OF_SUMS;
    Seen seen(tiles[blockIdx.x]);
    Head<DEPTH> query = work.part(qkv, 0), key = work.part(qkv, 1), value = work.part(qkv, 2);
    Dropout dropout = of_block(of_pass, seen.tile.block, work.head);
    query.load(queries, STAYING, [&](uint32_t j) { return seen.query(j); });
    bool busy = warp * SIDE < seen.tile.count;
    uint32_t i = seen.number + warp * SIDE + own;
    float most = -INFINITY, sum = 0;
    for (uint32_t start = 0; start < seen.end; start += PASSING) {
        __syncthreads();
        key.load(keys, PASSING, [&](uint32_t j) { return seen.row_of(start + j); });
        __syncthreads();
        for (uint32_t part = 0; busy && part < PASSING && start + part < seen.end; part += SIDE) {
            __syncwarp();
            multiply<DEPTH>(sums, queries + warp * SIDE * PITCH, keys + part * PITCH);
            __syncwarp();
            float score[OF_LANE], largest = most;
            for (uint32_t c = 0; c < OF_LANE; c++) {
                bool counts = seen.sees(i, start + part + first + c);
                score[c] = counts ? sums[own * PITCH_OF_SUMS + first + c] * work.root : -INFINITY;
                largest = fmaxf(largest, score[c]);
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            float more = 0;
            for (uint32_t c = 0; c < OF_LANE; c++) more += expf(score[c] - largest);
            more += __shfl_xor_sync(ALL_LANES, more, 1);
            sum = sum * expf(most - largest) + more;
            most = largest;
        }
    }
    float logarithm = most + logf(sum);
    Sums out[DEPTH / SIDE];
    clear<DEPTH>(out);
    for (uint32_t start = 0; start < seen.end; start += PASSING) {
        __syncthreads();
        key.load(keys, PASSING, [&](uint32_t j) { return seen.row_of(start + j); });
        value.load(values, PASSING, [&](uint32_t j) { return seen.row_of(start + j); });
        __syncthreads();
        for (uint32_t part = 0; busy && part < PASSING && start + part < seen.end; part += SIDE) {
            __syncwarp();
            multiply<DEPTH>(sums, queries + warp * SIDE * PITCH, keys + part * PITCH);
            __syncwarp();
            for (uint32_t c = 0; c < OF_LANE; c++) {
                uint32_t column = start + part + first + c;
                float score = sums[own * PITCH_OF_SUMS + first + c] * work.root;
                float weight = seen.sees(i, column) ? expf(score - logarithm) : 0.0f;
                if (dropout.limit != 0xffffffffu) weight = dropout(weight, i * seen.width + column);
                shares[own * PITCH_OF_SHARES + first + c] = __float2bfloat16(weight);
            }
            __syncwarp();
            add_shares<DEPTH>(out, shares, values + part * PITCH);
        }
    }
    if (!busy) return;
    uint32_t row = seen.tile.first + warp * SIDE, count = min(SIDE, seen.tile.count - warp * SIDE);
    if (own < count && work.lane % 2 == 0) logarithms[size_t(row + own) * heads + work.head] = logarithm;
    write_rows<DEPTH>(y + size_t(row) * work.hidden + work.head * DEPTH, work.hidden, count, out, sums);
}

template <uint32_t DEPTH>
__device__ __forceinline__ void queries_backward(
    bf16* shared, const bf16* qkv, const QueryTile* tiles, const bf16* dy, const float* logarithms, const float* delta,
    bf16* dqkv, uint32_t heads, Dropout of_pass
) {
    constexpr uint32_t PITCH = Head<DEPTH>::PITCH;
    Work<DEPTH> work(heads);
    uint32_t warp = work.warp, own = work.own, first = work.first;
    bf16 *queries = shared, *gradients = queries + STAYING * PITCH, *keys = gradients + STAYING * PITCH;
    bf16 *values = keys + PASSING * PITCH, *shares = values + PASSING * PITCH + warp * SIDE * PITCH_OF_SHARES;
    float* sums = reinterpret_cast<float*>(values + PASSING * PITCH + WARPS * SIDE * PITCH_OF_SHARES);
    sums += warp * 2 * SIDE * PITCH_OF_SUMS;
    float* by_weight = sums + SIDE * PITCH_OF_SUMS;
    Seen seen(tiles[blockIdx.x]);
    Head<DEPTH> query = work.part(qkv, 0), key = work.part(qkv, 1), value = work.part(qkv, 2), gradient = work.gradient(dy);
    Dropout dropout = of_block(of_pass, seen.tile.block, work.head);
    query.load(queries, STAYING, [&](uint32_t j) { return seen.query(j); });
    gradient.load(gradients, STAYING, [&](uint32_t j) { return seen.query(j); });
    bool busy = warp * SIDE < seen.tile.count, present = warp * SIDE + own < seen.tile.count;
    uint32_t i = seen.number + warp * SIDE + own;
    size_t at = size_t(seen.tile.first + warp * SIDE + own) * heads + work.head;
    float logarithm = present ? logarithms[at] : 0.0f, projection = present ? delta[at] : 0.0f;
    Sums out[DEPTH / SIDE];
    clear<DEPTH>(out);
    for (uint32_t start = 0; start < seen.end; start += PASSING) {
        __syncthreads();
        key.load(keys, PASSING, [&](uint32_t j) { return seen.row_of(start + j); });
        value.load(values, PASSING, [&](uint32_t j) { return seen.row_of(start + j); });
        __syncthreads();
        for (uint32_t part = 0; busy && part < PASSING && start + part < seen.end; part += SIDE) {
            __syncwarp();
            multiply<DEPTH>(sums, queries + warp * SIDE * PITCH, keys + part * PITCH);
            multiply<DEPTH>(by_weight, gradients + warp * SIDE * PITCH, values + part * PITCH);
            __syncwarp();
            for (uint32_t c = 0; c < OF_LANE; c++) {
                uint32_t column = start + part + first + c, place = own * PITCH_OF_SUMS + first + c;
                float by = by_weight[place];
                if (dropout.limit != 0xffffffffu) by = dropout(by, i * seen.width + column);
                bool counts = present && seen.sees(i, column);
                float by_score = counts ? expf(sums[place] * work.root - logarithm) * (by - projection) * work.root : 0.0f;
                shares[own * PITCH_OF_SHARES + first + c] = __float2bfloat16(by_score);
            }
            __syncwarp();
            add_shares<DEPTH>(out, shares, keys + part * PITCH);
        }
    }
    if (!busy) return;
    uint32_t row = seen.tile.first + warp * SIDE, count = min(SIDE, seen.tile.count - warp * SIDE);
    write_rows<DEPTH>(dqkv + size_t(row) * work.stride + work.head * DEPTH, work.stride, count, out, sums);
}

template <uint32_t DEPTH>
__device__ __forceinline__ void keys_backward(
    bf16* shared, const bf16* qkv, const KeyTile* tiles, const Segment* segments, const bf16* dy, const float* logarithms,
    const float* delta, bf16* dqkv, uint32_t heads, Dropout of_pass
) {
    constexpr uint32_t PITCH = Head<DEPTH>::PITCH;
    Work<DEPTH> work(heads);
    uint32_t warp = work.warp, own = work.own, first = work.first;
    bf16 *keys = shared, *values = keys + STAYING * PITCH, *queries = values + STAYING * PITCH;
    bf16 *gradients = queries + PASSING * PITCH, *shares = gradients + PASSING * PITCH;
    // What the rows' softmax and its gradient are measured from.
    float* logarithm = reinterpret_cast<float*>(shares + WARPS * 2 * SIDE * PITCH_OF_SHARES);
    float *projection = logarithm + PASSING, *sums = projection + PASSING + warp * 2 * SIDE * PITCH_OF_SUMS;
    float* by_weight = sums + SIDE * PITCH_OF_SUMS;
    shares += warp * 2 * SIDE * PITCH_OF_SHARES;
    bf16* by_score = shares + SIDE * PITCH_OF_SHARES;
    KeyTile tile = tiles[blockIdx.x];
    Head<DEPTH> query = work.part(qkv, 0), key = work.part(qkv, 1), value = work.part(qkv, 2), gradient = work.gradient(dy);
    auto key_row = [&](uint32_t j) { return j < tile.count ? tile.first + j : 0xffffffffu; };
    key.load(keys, STAYING, key_row);
    value.load(values, STAYING, key_row);
    bool busy = warp * SIDE < tile.count;
    uint32_t k = warp * SIDE + own;
    Sums by_key[DEPTH / SIDE], by_value[DEPTH / SIDE];
    clear<DEPTH>(by_key);
    clear<DEPTH>(by_value);
    for (uint32_t number = tile.segment; number < tile.segment + tile.segments; number++) {
        Segment segment = segments[number];
        Dropout dropout = of_block(of_pass, segment.block, work.head);
        // Rows before the first that sees a key of the tile need not pass.
        for (uint32_t start = segment.causal ? segment.first_seen : 0; start < segment.rows; start += PASSING) {
            auto query_row = [&](uint32_t j) { return start + j < segment.rows ? segment.block + start + j : 0xffffffffu; };
            __syncthreads();
            query.load(queries, PASSING, query_row);
            gradient.load(gradients, PASSING, query_row);
            for (uint32_t j = threadIdx.x; j < PASSING; j += blockDim.x) {
                bool present = start + j < segment.rows;
                size_t at = size_t(segment.block + start + j) * heads + work.head;
                logarithm[j] = present ? logarithms[at] : 0.0f;
                projection[j] = present ? delta[at] : 0.0f;
            }
            __syncthreads();
            for (uint32_t part = 0; busy && part < PASSING && start + part < segment.rows; part += SIDE) {
                __syncwarp();
                multiply<DEPTH>(sums, keys + warp * SIDE * PITCH, queries + part * PITCH);
                multiply<DEPTH>(by_weight, values + warp * SIDE * PITCH, gradients + part * PITCH);
                __syncwarp();
                for (uint32_t c = 0; c < OF_LANE; c++) {
                    uint32_t j = part + first + c, i = start + j, index = i * segment.width + segment.column + k;
                    bool counts = i < segment.rows && (!segment.causal || i >= segment.first_seen + k);
                    float weight = counts ? expf(sums[own * PITCH_OF_SUMS + first + c] * work.root - logarithm[j]) : 0.0f;
                    float kept = weight, by = by_weight[own * PITCH_OF_SUMS + first + c];
                    if (dropout.limit != 0xffffffffu) {
                        kept = dropout(weight, index);
                        by = dropout(by, index);
                    }
                    shares[own * PITCH_OF_SHARES + first + c] = __float2bfloat16(kept);
                    by_score[own * PITCH_OF_SHARES + first + c] = __float2bfloat16(weight * (by - projection[j]) * work.root);
                }
                __syncwarp();
                add_shares<DEPTH>(by_value, shares, gradients + part * PITCH);
                add_shares<DEPTH>(by_key, by_score, queries + part * PITCH);
            }
        }
    }
    if (!busy) return;
    uint32_t count = min(SIDE, tile.count - warp * SIDE);
    bf16* to = dqkv + size_t(tile.first + warp * SIDE) * work.stride + work.hidden + work.head * DEPTH;
    write_rows<DEPTH>(to, work.stride, count, by_key, sums);
    write_rows<DEPTH>(to + work.hidden, work.stride, count, by_value, sums);
}

}  // namespace tensor

// Names of the kernels end with the width of a head.
#define OF_DEPTH(depth)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) attention_bf16_##depth(                                                   \
        const bf16* qkv, const QueryTile* tiles, bf16* y, float* logarithms, uint32_t heads, const uint32_t* seed,              \
        uint32_t limit,                                                                                                         \
        float scale                                                                                                             \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        auto place = reinterpret_cast<bf16*>(shared);                                                                           \
        tensor::forward<depth>(place, qkv, tiles, y, logarithms, heads, seeded(seed, limit, scale));                            \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(128) attention_bf16_queries_backward_##depth(                                  \
        const bf16* qkv, const QueryTile* tiles, const bf16* dy, const float* logarithms, const float* delta, bf16* dqkv,       \
        uint32_t heads, const uint32_t* seed, uint32_t limit, float scale                                                       \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        auto place = reinterpret_cast<bf16*>(shared);                                                                           \
        tensor::queries_backward<depth>(place, qkv, tiles, dy, logarithms, delta, dqkv, heads, seeded(seed, limit, scale));     \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(128) attention_bf16_keys_backward_##depth(                                     \
        const bf16* qkv, const KeyTile* tiles, const Segment* segments, const bf16* dy, const float* logarithms,                \
        const float* delta, bf16* dqkv, uint32_t heads, const uint32_t* seed, uint32_t limit, float scale                       \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        auto place = reinterpret_cast<bf16*>(shared);                                                                           \
        tensor::keys_backward<depth>(                                                                                           \
            place, qkv, tiles, segments, dy, logarithms, delta, dqkv, heads, seeded(seed, limit, scale)                         \
        );                                                                                                                      \
    }

OF_DEPTH(32)
OF_DEPTH(64)
