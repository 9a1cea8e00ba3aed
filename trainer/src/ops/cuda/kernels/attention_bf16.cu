// Attention as in attention.cu, its products on tensor cores: factors in bf16, sums in f32.
//
// A block has four warps, each with 16 rows that stay (queries forward and in their own backward pass, keys in theirs); PASSING
// rows at a time pass by all of them, and are on their way while those before them are worked on. What a warp's products give stays
// in its registers: scores become probabilities there, which are a factor of the next product (FlashAttention-2, arXiv 2307.08691).
// Exponentials and logarithms are of two.
#include "attention.cuh"
#include "mma.cuh"

namespace tensor {

constexpr uint32_t SIDE = 16, WARPS = 4, THREADS = WARPS * WARP, STAYING = WARPS * SIDE, PASSING = 32;
constexpr uint32_t ABSENT = 0xffffffffu;

// What a warp's lane has of a product [16, 16]: of both halves of its columns, see `multiply_add`. Value e of half n is in row
// `row(e)`, column `column(n, e)`.
using Sums = float[2][4];

__device__ __forceinline__ uint32_t row(uint32_t e) { return threadIdx.x % WARP / 4 + e / 2 * 8; }
__device__ __forceinline__ uint32_t column(uint32_t n, uint32_t e) { return n * 8 + threadIdx.x % 4 * 2 + e % 2; }

// The sums as the left factor of a product.
__device__ __forceinline__ void to_factor(uint32_t (&factor)[4], const Sums& sums) {
#pragma unroll
    for (uint32_t word = 0; word < 4; word++) factor[word] = pair(sums[word / 2][word % 2 * 2], sums[word / 2][word % 2 * 2 + 1]);
}

// Rows of a head in shared memory, DEPTH values each. The pitch lets rows begin in different banks.
template <uint32_t DEPTH>
struct Rows {
    static constexpr uint32_t PITCH = DEPTH + FEW, STEPS = DEPTH / SIDE;
    bf16* values;

    __device__ __forceinline__ Rows from(uint32_t row) const { return {values + row * PITCH}; }

    // Sixteen of them as the left factor of products.
    __device__ __forceinline__ void load(uint32_t (&factor)[STEPS][4]) const {
        uint32_t lane = threadIdx.x % WARP;
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            load_four(factor[step], values + lane % SIDE * PITCH + step * SIDE + lane / SIDE * 8);
        }
    }

    // factor[16, DEPTH] · these[16, DEPTH]ᵀ
    __device__ __forceinline__ void products(Sums& sums, const uint32_t (&factor)[STEPS][4]) const {
        uint32_t lane = threadIdx.x % WARP, words[4];
#pragma unroll
        for (uint32_t e = 0; e < 8; e++) sums[e / 4][e % 4] = 0;
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            load_four(words, values + (lane / SIDE * 8 + lane % 8) * PITCH + step * SIDE + lane / 8 % 2 * 8);
            multiply_add(sums[0], factor[step], words[0], words[1]);
            multiply_add(sums[1], factor[step], words[2], words[3]);
        }
    }

    // out[16, DEPTH] += factor[16, 16] · these[16, DEPTH]
    __device__ __forceinline__ void add_up(Sums (&out)[STEPS], const uint32_t (&factor)[4]) const {
        uint32_t lane = threadIdx.x % WARP, words[4];
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            load_four_turned(words, values + lane % SIDE * PITCH + step * SIDE + lane / SIDE * 8);
            multiply_add(out[step][0], factor, words[0], words[1]);
            multiply_add(out[step][1], factor, words[2], words[3]);
        }
    }

    // The first `count` of sums[16, DEPTH] to rows of `stride` values, by way of these sixteen, which must be the warp's alone.
    __device__ __forceinline__ void write(bf16* to, uint32_t stride, uint32_t count, const Sums (&sums)[STEPS]) const {
        __syncwarp();
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            for (uint32_t e = 0; e < 8; e += 2) {
                uint32_t at = row(e % 4) * PITCH + step * SIDE + column(e / 4, 0);
                *reinterpret_cast<uint32_t*>(values + at) = pair(sums[step][e / 4][e % 4], sums[step][e / 4][e % 4 + 1]);
            }
        }
        __syncwarp();
        for (uint32_t i = threadIdx.x % WARP; i < SIDE * DEPTH / FEW; i += WARP) {
            uint32_t j = i / (DEPTH / FEW), t = i % (DEPTH / FEW) * FEW;
            if (j < count) *reinterpret_cast<uint4*>(to + size_t(j) * stride + t) = *reinterpret_cast<uint4*>(values + j * PITCH + t);
        }
    }
};

template <uint32_t DEPTH>
__device__ __forceinline__ void clear(Sums (&sums)[DEPTH / SIDE]) {
#pragma unroll
    for (uint32_t i = 0; i < DEPTH / 2; i++) sums[i / 8][i / 4 % 2][i % 4] = 0;
}

// COUNT rows of a head on their way from memory, sixteen bytes at a time, all of which begin in such.
template <uint32_t DEPTH, uint32_t COUNT>
struct Coming {
    static constexpr uint32_t EACH = COUNT * DEPTH / FEW / THREADS;
    static_assert(EACH * FEW * THREADS == COUNT * DEPTH, "each of the block's threads brings equally many");
    uint4 few[EACH];

    static __device__ __forceinline__ uint32_t row(uint32_t i) { return (threadIdx.x + i * THREADS) / (DEPTH / FEW); }
    static __device__ __forceinline__ uint32_t first() { return threadIdx.x % (DEPTH / FEW) * FEW; }

    // Row j from place(j); zeros where that is ABSENT.
    template <typename Place>
    __device__ __forceinline__ void ask(const bf16* values, uint32_t stride, Place place) {
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            uint32_t at = place(row(i));
            few[i] = {0, 0, 0, 0};
            if (at != ABSENT) few[i] = *reinterpret_cast<const uint4*>(values + size_t(at) * stride + first());
        }
    }

    __device__ __forceinline__ void put(Rows<DEPTH> to) const {
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) *reinterpret_cast<uint4*>(to.values + row(i) * to.PITCH + first()) = few[i];
    }

    // With the part of a bias that is these columns'.
    __device__ __forceinline__ void put(Rows<DEPTH> to, const uint4& bias) {
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            few[i] = {
                sum_of_pairs(few[i].x, bias.x), sum_of_pairs(few[i].y, bias.y), sum_of_pairs(few[i].z, bias.z),
                sum_of_pairs(few[i].w, bias.w)
            };
        }
        put(to);
    }
};

// Of a head's part of the bias, the columns that this thread brings; rounded, and zeros where there is no bias.
template <uint32_t DEPTH>
__device__ __forceinline__ uint4 columns_of(const float* bias, uint32_t part_and_head) {
    float few[FEW];
    uint32_t first = part_and_head + threadIdx.x % (DEPTH / FEW) * FEW;
    read_few(bias ? bias + first : bias, bias ? FEW : 0, few);
    return {pair(few[0], few[1]), pair(few[2], few[3]), pair(few[4], few[5]), pair(few[6], few[7])};
}

// Which head a block of threads works on.
template <uint32_t DEPTH>
struct Work {
    uint32_t head = blockIdx.y, heads, hidden = heads * DEPTH, stride = 3 * hidden;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float root = 1.0f / sqrtf(DEPTH), root_of_two = root * LOG2_E;

    __device__ __forceinline__ explicit Work(uint32_t heads) : heads(heads) {}

    // Queries, keys or values: part 0, 1 or 2 of a row of `qkv`.
    template <typename T>
    __device__ __forceinline__ T* part(T* qkv, uint32_t number) const { return qkv + number * hidden + head * DEPTH; }

    __device__ __forceinline__ uint4 bias_of(const float* bias, uint32_t number) const {
        return columns_of<DEPTH>(bias, number * hidden + head * DEPTH);
    }

    // Of what has a value for each row and head.
    __device__ __forceinline__ size_t at(uint32_t row) const { return size_t(row) * heads + head; }
};

// Which columns a query tile's rows see, and where these lie.
struct Seen {
    QueryTile tile;
    // Number of the tile's first row in its block; columns; of these, those that any row of the tile sees.
    uint32_t number, width, end;

    __device__ __forceinline__ explicit Seen(const QueryTile& tile)
        : tile(tile), number(tile.first - tile.block), width(tile.context_rows + tile.rows),
          end(tile.causal ? tile.context_rows + number + tile.count : width) {}

    __device__ __forceinline__ uint32_t row_of(uint32_t column) const {
        if (column >= end) return ABSENT;
        return column < tile.context_rows ? tile.context + column : tile.block + column - tile.context_rows;
    }

    __device__ __forceinline__ uint32_t query(uint32_t j) const { return j < tile.count ? tile.first + j : ABSENT; }

    // Columns that row i of the block sees, from the first on.
    __device__ __forceinline__ uint32_t seen_by(uint32_t i) const {
        return tile.causal ? min(end, tile.context_rows + i + 1) : end;
    }
};

template <uint32_t DEPTH, bool DROPS>
__device__ __forceinline__ void forward(
    bf16* shared, const bf16* qkv, const float* bias, const QueryTile* tiles, bf16* y, float* logarithms, uint32_t heads,
    Dropout of_pass
) {
    constexpr uint32_t STEPS = DEPTH / SIDE;
    using Of = Rows<DEPTH>;
    Work<DEPTH> work(heads);
    Of queries = {shared}, keys = queries.from(STAYING), values = keys.from(PASSING), own = queries.from(work.warp * SIDE);
    Seen seen(tiles[blockIdx.x]);
    if (seen.tile.count == 0) return;
    const bf16 *key = work.part(qkv, 1), *value = work.part(qkv, 2);
    uint4 of_keys = work.bias_of(bias, 1), of_values = work.bias_of(bias, 2);
    Dropout dropout = of_block(of_pass, seen.tile.block, work.head);
    Coming<DEPTH, PASSING> coming_keys, coming_values;
    auto ask = [&](uint32_t start) {
        auto place = [&](uint32_t j) { return seen.row_of(start + j); };
        coming_keys.ask(key, work.stride, place);
        coming_values.ask(value, work.stride, place);
    };
    {
        Coming<DEPTH, STAYING> coming;
        coming.ask(work.part(qkv, 0), work.stride, [&](uint32_t j) { return seen.query(j); });
        ask(0);
        coming.put(queries, work.bias_of(bias, 0));
    }
    __syncthreads();
    uint32_t query[STEPS][4];
    own.load(query);
    bool busy = work.warp * SIDE < seen.tile.count;
    // Of the lane's two rows: their numbers in the block, what they see, and of the softmax its largest score and its sum.
    uint32_t i = seen.number + work.warp * SIDE + row(0), sees[2] = {seen.seen_by(i), seen.seen_by(i + 8)};
    // What all of the warp's rows see, and what any of them does.
    uint32_t first = seen.number + work.warp * SIDE, all = seen.seen_by(first), any = seen.seen_by(first + SIDE - 1);
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    Sums out[STEPS];
    clear<DEPTH>(out);
    for (uint32_t start = 0; start < seen.end; start += PASSING) {
        __syncthreads();
        coming_keys.put(keys, of_keys);
        coming_values.put(values, of_values);
        __syncthreads();
        if (start + PASSING < seen.end) ask(start + PASSING);
        __syncwarp();
        if (!busy || start >= any) continue;
        Sums scores[PASSING / SIDE];
#pragma unroll
        for (uint32_t part = 0; part < PASSING / SIDE; part++) {
            // What lies behind the last key is zero.
            keys.from(part * SIDE).products(scores[part], query);
        }
        if (start + PASSING > all) {
#pragma unroll
            for (uint32_t v = 0; v < PASSING / 2; v++) {
                uint32_t part = v / 8, n = v / 4 % 2, e = v % 4;
                if (start + part * SIDE + column(n, e) >= sees[e / 2]) scores[part][n][e] = -INFINITY;
            }
        }
        float largest[2] = {most[0], most[1]};
#pragma unroll
        for (uint32_t v = 0; v < PASSING / 2; v++) largest[v / 2 % 2] = fmaxf(largest[v / 2 % 2], scores[v / 8][v / 4 % 2][v % 4]);
        float shift[2];
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(ALL_LANES, largest[r], 1));
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(ALL_LANES, largest[r], 2));
            float factor = power_of_two((most[r] - largest[r]) * work.root_of_two);
            most[r] = largest[r];
            shift[r] = -largest[r] * work.root_of_two;
            sum[r] *= factor;
#pragma unroll
            for (uint32_t v = 0; v < DEPTH / 4; v++) out[v / 4][v / 2 % 2][2 * r + v % 2] *= factor;
        }
#pragma unroll
        for (uint32_t part = 0; part < PASSING / SIDE; part++) {
#pragma unroll
            for (uint32_t v = 0; v < 8; v++) {
                uint32_t n = v / 4, e = v % 4;
                float& share = scores[part][n][e];
                share = power_of_two(share * work.root_of_two + shift[e / 2]);
                sum[e / 2] += share;
                uint32_t index = (i + e / 2 * 8) * seen.width + start + part * SIDE + column(n, e);
                if (DROPS) share = dropout.keeps(index) ? share : 0.0f;
            }
            uint32_t factor[4];
            to_factor(factor, scores[part]);
            values.from(part * SIDE).add_up(out, factor);
        }
    }
    if (!busy) return;
    float factor[2];
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 1);
        sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 2);
        factor[r] = dropout.scale / sum[r];
    }
#pragma unroll
    for (uint32_t v = 0; v < DEPTH / 2; v++) out[v / 8][v / 4 % 2][v % 4] *= factor[v / 2 % 2];
    uint32_t at = seen.tile.first + work.warp * SIDE, count = min(SIDE, seen.tile.count - work.warp * SIDE);
    for (uint32_t r = 0; r < 2; r++) {
        if (work.lane % 4 == 0 && row(2 * r) < count) {
            logarithms[work.at(at + row(2 * r))] = most[r] * work.root_of_two + log2f(sum[r]);
        }
    }
    own.write(y + size_t(at) * work.hidden + work.head * DEPTH, work.hidden, count, out);
}

template <uint32_t DEPTH, bool DROPS>
__device__ __forceinline__ void queries_backward(
    bf16* shared, const bf16* qkv, const float* bias, const QueryTile* tiles, const bf16* dy, const float* logarithms,
    const float* delta, bf16* dqkv, uint32_t heads, Dropout of_pass
) {
    constexpr uint32_t STEPS = DEPTH / SIDE;
    using Of = Rows<DEPTH>;
    Work<DEPTH> work(heads);
    Of queries = {shared}, gradients = queries.from(STAYING), keys = gradients.from(STAYING), values = keys.from(PASSING);
    Of own = queries.from(work.warp * SIDE);
    Seen seen(tiles[blockIdx.x]);
    if (seen.tile.count == 0) return;
    const bf16 *key = work.part(qkv, 1), *value = work.part(qkv, 2);
    uint4 of_keys = work.bias_of(bias, 1), of_values = work.bias_of(bias, 2);
    Dropout dropout = of_block(of_pass, seen.tile.block, work.head);
    Coming<DEPTH, PASSING> coming_keys, coming_values;
    auto ask = [&](uint32_t start) {
        auto place = [&](uint32_t j) { return seen.row_of(start + j); };
        coming_keys.ask(key, work.stride, place);
        coming_values.ask(value, work.stride, place);
    };
    {
        Coming<DEPTH, STAYING> coming, coming_gradients;
        auto place = [&](uint32_t j) { return seen.query(j); };
        coming.ask(work.part(qkv, 0), work.stride, place);
        coming_gradients.ask(dy + work.head * DEPTH, work.hidden, place);
        ask(0);
        coming.put(queries, work.bias_of(bias, 0));
        coming_gradients.put(gradients);
    }
    __syncthreads();
    uint32_t query[STEPS][4], gradient[STEPS][4];
    own.load(query);
    gradients.from(work.warp * SIDE).load(gradient);
    bool busy = work.warp * SIDE < seen.tile.count;
    uint32_t at = seen.tile.first + work.warp * SIDE, count = busy ? min(SIDE, seen.tile.count - work.warp * SIDE) : 0;
    uint32_t i = seen.number + work.warp * SIDE + row(0), sees[2] = {seen.seen_by(i), seen.seen_by(i + 8)};
    uint32_t first = seen.number + work.warp * SIDE, all = seen.seen_by(first), any = seen.seen_by(first + SIDE - 1);
    float logarithm[2], projection[2];
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        bool present = row(2 * r) < count;
        logarithm[r] = present ? logarithms[work.at(at + row(2 * r))] : 0.0f;
        projection[r] = present ? delta[work.at(at + row(2 * r))] : 0.0f;
    }
    Sums out[STEPS];
    clear<DEPTH>(out);
    for (uint32_t start = 0; start < seen.end; start += PASSING) {
        __syncthreads();
        coming_keys.put(keys, of_keys);
        coming_values.put(values, of_values);
        __syncthreads();
        if (start + PASSING < seen.end) ask(start + PASSING);
        __syncwarp();
#pragma unroll
        for (uint32_t part = 0; part < PASSING; part += SIDE) {
            if (!busy || start + part >= any) break;
            Sums scores, by_share;
            keys.from(part).products(scores, query);
            values.from(part).products(by_share, gradient);
#pragma unroll
            for (uint32_t v = 0; v < 8; v++) {
                uint32_t n = v / 4, e = v % 4, seen_column = start + part + column(n, e);
                float share = power_of_two(scores[n][e] * work.root_of_two - logarithm[e / 2]), by = by_share[n][e];
                if (DROPS) by = dropout(by, (i + e / 2 * 8) * seen.width + seen_column);
                scores[n][e] = share * (by - projection[e / 2]);
            }
            if (start + part + SIDE > all) {
#pragma unroll
                for (uint32_t v = 0; v < 8; v++) {
                    if (start + part + column(v / 4, v) >= sees[v / 2 % 2]) scores[v / 4][v % 4] = 0;
                }
            }
            uint32_t factor[4];
            to_factor(factor, scores);
            keys.from(part).add_up(out, factor);
        }
    }
    if (!busy) return;
#pragma unroll
    for (uint32_t v = 0; v < DEPTH / 2; v++) out[v / 8][v / 4 % 2][v % 4] *= work.root;
    own.write(work.part(dqkv, 0) + size_t(at) * work.stride, work.stride, count, out);
}

// Rows that see a key tile, PASSING at a time, one block of them after another.
struct Passing {
    uint32_t number, end, start;
    Segment segment;

    __device__ __forceinline__ Passing(const KeyTile& tile, const Segment* segments)
        : number(tile.segment), end(tile.segment + tile.segments), start(0), segment() {
        begin(segments);
    }

    // Rows before the first that sees a key of the tile need not pass.
    __device__ __forceinline__ void begin(const Segment* segments) {
        if (number == end) return;
        segment = segments[number];
        start = segment.causal ? segment.first_seen : 0;
    }

    __device__ __forceinline__ bool there() const { return number < end; }

    __device__ __forceinline__ void go_on(const Segment* segments) {
        start += PASSING;
        if (start < segment.rows) return;
        number++;
        begin(segments);
    }

    __device__ __forceinline__ uint32_t row(uint32_t j) const {
        return start + j < segment.rows ? segment.block + start + j : ABSENT;
    }
};

template <uint32_t DEPTH, bool DROPS>
__device__ __forceinline__ void keys_backward(
    bf16* shared, const bf16* qkv, const float* bias, const KeyTile* tiles, const Segment* segments, const bf16* dy,
    const float* logarithms, const float* delta, bf16* dqkv, uint32_t heads, Dropout of_pass
) {
    constexpr uint32_t STEPS = DEPTH / SIDE;
    using Of = Rows<DEPTH>;
    Work<DEPTH> work(heads);
    Of keys = {shared}, values = keys.from(STAYING), queries = values.from(STAYING), gradients = queries.from(PASSING);
    // What the passing rows' softmax and its gradient are measured from.
    float *logarithm = reinterpret_cast<float*>(gradients.from(PASSING).values), *projection = logarithm + PASSING;
    KeyTile tile = tiles[blockIdx.x];
    if (tile.count == 0) return;
    const bf16 *query = work.part(qkv, 0), *gradient = dy + work.head * DEPTH;
    uint4 of_queries = work.bias_of(bias, 0);
    Passing passing(tile, segments);
    Coming<DEPTH, PASSING> coming_queries, coming_gradients;
    float coming_logarithm = 0, coming_projection = 0;
    auto ask = [&](const Passing& next) {
        auto place = [&](uint32_t j) { return next.row(j); };
        coming_queries.ask(query, work.stride, place);
        coming_gradients.ask(gradient, work.hidden, place);
        uint32_t row = threadIdx.x < PASSING ? next.row(threadIdx.x) : ABSENT;
        coming_logarithm = row != ABSENT ? logarithms[work.at(row)] : 0.0f;
        coming_projection = row != ABSENT ? delta[work.at(row)] : 0.0f;
    };
    {
        Coming<DEPTH, STAYING> coming_keys, coming_values;
        auto place = [&](uint32_t j) { return j < tile.count ? tile.first + j : ABSENT; };
        coming_keys.ask(work.part(qkv, 1), work.stride, place);
        coming_values.ask(work.part(qkv, 2), work.stride, place);
        if (passing.there()) ask(passing);
        coming_keys.put(keys, work.bias_of(bias, 1));
        coming_values.put(values, work.bias_of(bias, 2));
    }
    __syncthreads();
    Of own_keys = keys.from(work.warp * SIDE), own_values = values.from(work.warp * SIDE);
    uint32_t key[STEPS][4];
    own_keys.load(key);
    bool busy = work.warp * SIDE < tile.count;
    Sums by_key[STEPS], by_value[STEPS];
    clear<DEPTH>(by_key);
    clear<DEPTH>(by_value);
    while (passing.there()) {
        __syncthreads();
        coming_queries.put(queries, of_queries);
        coming_gradients.put(gradients);
        if (threadIdx.x < PASSING) {
            logarithm[threadIdx.x] = coming_logarithm;
            projection[threadIdx.x] = coming_projection;
        }
        __syncthreads();
        Segment segment = passing.segment;
        uint32_t start = passing.start;
        passing.go_on(segments);
        if (passing.there()) ask(passing);
        __syncwarp();
        Dropout dropout = of_block(of_pass, segment.block, work.head);
        // Of the warp's keys, the first row that sees the first, and the first that sees all of them.
        uint32_t any = segment.causal ? segment.first_seen + work.warp * SIDE : 0, all = segment.causal ? any + SIDE - 1 : 0;
#pragma unroll
        for (uint32_t part = 0; part < PASSING; part += SIDE) {
            if (!busy || start + part >= segment.rows) break;
            if (start + part + SIDE <= any) continue;
            Sums shares, by_score;
            uint32_t value[STEPS][4];
            own_values.load(value);
            queries.from(part).products(shares, key);
            gradients.from(part).products(by_score, value);
#pragma unroll
            for (uint32_t v = 0; v < 8; v++) {
                uint32_t n = v / 4, e = v % 4, j = part + column(n, 0);
                float2 both = *reinterpret_cast<float2*>(logarithm + j), projections = *reinterpret_cast<float2*>(projection + j);
                float share = power_of_two(shares[n][e] * work.root_of_two - (e % 2 ? both.y : both.x)), by = by_score[n][e];
                shares[n][e] = share;
                if (DROPS) {
                    uint32_t index = (start + j + e % 2) * segment.width + segment.column + work.warp * SIDE + row(e);
                    bool keeps = dropout.keeps(index);
                    shares[n][e] = keeps ? share : 0.0f;
                    by = keeps ? by * dropout.scale : 0.0f;
                }
                by_score[n][e] = share * (by - (e % 2 ? projections.y : projections.x));
            }
            if (start + part < all || start + part + SIDE > segment.rows) {
#pragma unroll
                for (uint32_t v = 0; v < 8; v++) {
                    uint32_t n = v / 4, e = v % 4, i = start + part + column(n, e);
                    bool counts = i < segment.rows && (!segment.causal || i >= any + row(e));
                    shares[n][e] = counts ? shares[n][e] : 0.0f;
                    by_score[n][e] = counts ? by_score[n][e] : 0.0f;
                }
            }
            uint32_t factor[4];
            to_factor(factor, shares);
            gradients.from(part).add_up(by_value, factor);
            to_factor(factor, by_score);
            queries.from(part).add_up(by_key, factor);
        }
    }
    if (!busy) return;
    float scale = of_pass.scale;
#pragma unroll
    for (uint32_t v = 0; v < DEPTH / 2; v++) {
        by_key[v / 8][v / 4 % 2][v % 4] *= work.root;
        by_value[v / 8][v / 4 % 2][v % 4] *= scale;
    }
    uint32_t count = min(SIDE, tile.count - work.warp * SIDE);
    size_t at = size_t(tile.first + work.warp * SIDE) * work.stride;
    own_keys.write(work.part(dqkv, 1) + at, work.stride, count, by_key);
    own_values.write(work.part(dqkv, 2) + at, work.stride, count, by_value);
}

// As `project` of attention.cu: a thread has FEW values of a row of a head, and its neighbours the others.
template <uint32_t DEPTH>
__device__ __forceinline__ void project(const bf16* y, const bf16* dy, float* delta, uint32_t count) {
    constexpr uint32_t EACH = DEPTH / FEW;
    uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, number = thread / EACH;
    float some[FEW] = {}, by[FEW] = {}, sum = 0;
    if (number < count) {
        widen(fetch(y + size_t(thread) * FEW), some);
        widen(fetch(dy + size_t(thread) * FEW), by);
    }
    for (uint32_t e = 0; e < FEW; e++) sum += some[e] * by[e];
    for (int lanes = EACH / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (number < count && thread % EACH == 0) delta[number] = sum;
}

}  // namespace tensor

// Names of the kernels end with the width of a head. So many blocks share a multiprocessor as its registers are enough for.
#define BY_DROPOUT(function, depth, ...)                                                                                        \
    limit == 0xffffffffu ? function<depth, false>(__VA_ARGS__) : function<depth, true>(__VA_ARGS__)
#define OF_DEPTH(depth)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(tensor::THREADS, 4) attention_bf16_##depth(                                    \
        const bf16* qkv, const float* bias, const QueryTile* tiles, bf16* y, float* logarithms, uint32_t heads,                 \
        const uint32_t* seed, uint32_t limit, float scale                                                                       \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        auto place = reinterpret_cast<bf16*>(shared);                                                                           \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        BY_DROPOUT(tensor::forward, depth, place, qkv, bias, tiles, y, logarithms, heads, dropout);                             \
    }                                                                                                                           \
    extern "C" __global__ void attention_bf16_delta_##depth(                                                                    \
        const bf16* y, const bf16* dy, float* delta, uint32_t count, uint32_t                                                   \
    ) {                                                                                                                         \
        tensor::project<depth>(y, dy, delta, count);                                                                            \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(tensor::THREADS, 3) attention_bf16_queries_backward_##depth(                   \
        const bf16* qkv, const float* bias, const QueryTile* tiles, const bf16* dy, const float* logarithms,                    \
        const float* delta, bf16* dqkv, uint32_t heads, const uint32_t* seed, uint32_t limit, float scale                       \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        auto place = reinterpret_cast<bf16*>(shared);                                                                           \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        BY_DROPOUT(tensor::queries_backward, depth, place, qkv, bias, tiles, dy, logarithms, delta, dqkv, heads, dropout);      \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(tensor::THREADS, 3) attention_bf16_keys_backward_##depth(                      \
        const bf16* qkv, const float* bias, const KeyTile* tiles, const Segment* segments, const bf16* dy,                      \
        const float* logarithms, const float* delta, bf16* dqkv, uint32_t heads, const uint32_t* seed, uint32_t limit,          \
        float scale                                                                                                             \
    ) {                                                                                                                         \
        SHARED(float, shared);                                                                                                  \
        auto place = reinterpret_cast<bf16*>(shared);                                                                           \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        BY_DROPOUT(                                                                                                             \
            tensor::keys_backward, depth, place, qkv, bias, tiles, segments, dy, logarithms, delta, dqkv, heads, dropout        \
        );                                                                                                                      \
    }

OF_DEPTH(32)
OF_DEPTH(64)
