// LayerNorm of a sum: y = (s − mean) / √(var + eps) · weight + bias, s = residual + dropout(x + added), `added` being the bias of the
// product that x is. A warp works on a row.
#include "device.cuh"

// Values of one row before the normalisation, made anew where they are needed.
template <typename T>
struct Row {
    const T *residual, *x;
    const float* added;
    size_t first;
    Dropout dropout;

    // FEW values from column i on, `count` of them of the row; the others are zero.
    __device__ __forceinline__ void sums(uint32_t i, uint32_t count, float (&to)[FEW]) const {
        read_few(x + first + i, count, to);
        float others[FEW];
        if (added) {
            read_few(added + i, count, others);
            for (uint32_t e = 0; e < FEW; e++) to[e] += others[e];
        }
        drop(i, to);
        if (residual) {
            read_few(residual + first + i, count, others);
            for (uint32_t e = 0; e < FEW; e++) to[e] += others[e];
        }
    }

    __device__ __forceinline__ void drop(uint32_t i, float (&values)[FEW]) const {
        if (dropout.limit == 0xffffffffu) return;
        for (uint32_t e = 0; e < FEW; e++) values[e] = dropout(values[e], uint32_t(first + i + e));
    }
};

// A lane's columns of a row: FEW from each `i` on, `count` of them there.
#define FOR_LANE(i, count, width)                                                                                               \
    for (uint32_t i = threadIdx.x % WARP * FEW, count; i < (width); i += WARP * FEW)                                            \
        if (count = min(FEW, (width) - i), true)

template <typename T>
__device__ __forceinline__ float2 moments(const Row<T>& row, uint32_t width, float eps) {
    float sum = 0, square = 0, some[FEW];
    FOR_LANE(i, count, width) {
        row.sums(i, count, some);
        for (uint32_t e = 0; e < FEW; e++) sum += some[e];
    }
    float mean = warp_sum(sum) / width;
    FOR_LANE(i, count, width) {
        row.sums(i, count, some);
        for (uint32_t e = 0; e < FEW; e++) square += e < count ? (some[e] - mean) * (some[e] - mean) : 0.0f;
    }
    return make_float2(mean, 1.0f / sqrtf(warp_sum(square) / width + eps));
}

template <typename T>
__device__ __forceinline__ void normalise(
    const T* residual, const T* x, const float* added, const float* weight, const float* bias, T* y, uint32_t rows,
    uint32_t width, float eps, Dropout dropout
) {
    uint32_t number = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (number >= rows) return;
    Row<T> row = {residual, x, added, size_t(number) * width, dropout};
    float2 of = moments(row, width, eps);
    FOR_LANE(i, count, width) {
        float some[FEW], factors[FEW], added[FEW];
        row.sums(i, count, some);
        read_few(weight + i, count, factors);
        read_few(bias + i, count, added);
        for (uint32_t e = 0; e < FEW; e++) some[e] = (some[e] - of.x) * of.y * factors[e] + added[e];
        write_few(y + row.first + i, count, some);
    }
}

// The block's row of `partial` [blocks, parts, width], of sums [warps, parts, FEW, spans], in which neighbouring lanes have neighbouring
// values.
__device__ __forceinline__ void add_up_warps(const float* sums, float* partial, uint32_t parts, uint32_t width) {
    uint32_t spans = (width + FEW - 1) / FEW, of_warp = parts * FEW * spans;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < parts * width; i += blockDim.x) {
        uint32_t column = i % width, place = (i / width * FEW + column % FEW) * spans + column / FEW;
        float sum = 0;
        for (uint32_t other = 0; other < blockDim.x / WARP; other++) sum += sums[size_t(other) * of_warp + place];
        partial[size_t(blockIdx.x) * parts * width + i] = sum;
    }
}

// Writes ds, the gradient by the sum, and dx, that by x where it differs (null where it does not). A block takes `rows_each`
// rows; row blockIdx.x of `partial` [blocks, 2, width] receives their share of the gradients by weight and bias, and where there is
// something added, that by it: [blocks, 3, width].
template <typename T>
__device__ __forceinline__ void normalise_backward(
    const T* residual, const T* x, const float* added, const float* weight, const T* dy, T* ds, T* dx, float* partial,
    float* sums, uint32_t rows, uint32_t width, uint32_t rows_each, float eps, Dropout dropout
) {
    uint32_t spans = (width + FEW - 1) / FEW, parts = added ? 3 : 2, of_warp = parts * FEW * spans;
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float *dweight = sums + size_t(warp) * of_warp, *dbias = dweight + FEW * spans, *dadded = dbias + FEW * spans;
    for (uint32_t i = lane; i < of_warp; i += WARP) dweight[i] = 0;
    __syncwarp();
    uint32_t first = blockIdx.x * rows_each, end = min(first + rows_each, rows);
    for (uint32_t number = first + warp; number < end; number += warps) {
        Row<T> row = {residual, x, added, size_t(number) * width, dropout};
        float2 of = moments(row, width, eps);
        float sum = 0, projection = 0, some[FEW], factors[FEW], by[FEW];
        FOR_LANE(i, count, width) {
            row.sums(i, count, some);
            read_few(weight + i, count, factors);
            read_few(dy + row.first + i, count, by);
            for (uint32_t e = 0; e < FEW; e++) {
                float normal = (some[e] - of.x) * of.y;
                sum += by[e] * factors[e];
                projection += by[e] * factors[e] * normal;
                dweight[e * spans + i / FEW] += by[e] * normal;
                dbias[e * spans + i / FEW] += by[e];
            }
        }
        sum = warp_sum(sum) / width;
        projection = warp_sum(projection) / width;
        FOR_LANE(i, count, width) {
            row.sums(i, count, some);
            read_few(weight + i, count, factors);
            read_few(dy + row.first + i, count, by);
            for (uint32_t e = 0; e < FEW; e++) {
                float normal = (some[e] - of.x) * of.y;
                by[e] = of.y * (by[e] * factors[e] - sum - normal * projection);
            }
            write_few(ds + row.first + i, count, by);
            row.drop(i, by);
            if (dx) write_few(dx + row.first + i, count, by);
            for (uint32_t e = 0; added && e < FEW; e++) dadded[e * spans + i / FEW] += by[e];
        }
    }
    add_up_warps(sums, partial, parts, width);
}

// A row of bf16 whose values a warp has in its registers: a multiple of FEW, at most STEPS · 256, in places of sixteen bytes. They are
// read, added up and dropped out once.
template <uint32_t STEPS>
struct Held {
    float values[STEPS][FEW];
    // A bit for each that dropout keeps.
    uint32_t kept;

    static __device__ __forceinline__ uint32_t column(uint32_t step) { return (step * WARP + threadIdx.x % WARP) * FEW; }

    // Also FEW values of another array each, read at the same time.
    __device__ __forceinline__ void read(const Row<bf16>& row, uint32_t width, const bf16* other, Few<bf16> (&others)[STEPS]) {
        static_assert(STEPS * FEW <= 32, "a bit for each value");
        Few<bf16> x[STEPS], residual[STEPS];
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            x[step] = residual[step] = others[step] = {};
            if (column(step) >= width) continue;
            x[step] = fetch(row.x + row.first + column(step));
            if (row.residual) residual[step] = fetch(row.residual + row.first + column(step));
            if (other) others[step] = fetch(other + row.first + column(step));
        }
        kept = 0xffffffffu;
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            float some[FEW];
            widen(x[step], values[step]);
            if (row.added && column(step) < width) {
                widen(fetch(row.added + column(step)), some);
                for (uint32_t e = 0; e < FEW; e++) values[step][e] += some[e];
            }
            if (row.dropout.limit != 0xffffffffu) {
                for (uint32_t e = 0; e < FEW; e++) {
                    bool keeps = row.dropout.keeps(uint32_t(row.first + column(step) + e));
                    values[step][e] = keeps ? values[step][e] * row.dropout.scale : 0.0f;
                    if (!keeps) kept &= ~(1u << (step * FEW + e));
                }
            }
            widen(residual[step], some);
            for (uint32_t e = 0; e < FEW; e++) values[step][e] += some[e];
        }
    }

    // Makes the values normal ones, with a mean of zero and a variance of one; gives what the deviations were multiplied by.
    __device__ __forceinline__ float normalise(uint32_t width, float eps) {
        float sum = 0, square = 0;
#pragma unroll
        for (uint32_t i = 0; i < STEPS * FEW; i++) sum += values[i / FEW][i % FEW];
        float mean = warp_sum(sum) / width;
#pragma unroll
        for (uint32_t i = 0; i < STEPS * FEW; i++) {
            float& value = values[i / FEW][i % FEW];
            value = column(i / FEW) < width ? value - mean : 0.0f;
            square += value * value;
        }
        float factor = 1.0f / sqrtf(warp_sum(square) / width + eps);
#pragma unroll
        for (uint32_t i = 0; i < STEPS * FEW; i++) values[i / FEW][i % FEW] *= factor;
        return factor;
    }
};

template <uint32_t STEPS>
__device__ __forceinline__ void normalise_held(
    const bf16* residual, const bf16* x, const float* added, const float* weight, const float* bias, bf16* y, uint32_t rows,
    uint32_t width, float eps, Dropout dropout
) {
    uint32_t number = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (number >= rows) return;
    Row<bf16> row = {residual, x, added, size_t(number) * width, dropout};
    Held<STEPS> held;
    Few<bf16> none[STEPS];
    held.read(row, width, nullptr, none);
    held.normalise(width, eps);
#pragma unroll
    for (uint32_t step = 0; step < STEPS; step++) {
        uint32_t i = held.column(step);
        if (i >= width) continue;
        float factors[FEW], more[FEW];
        widen(fetch(weight + i), factors);
        widen(fetch(bias + i), more);
        for (uint32_t e = 0; e < FEW; e++) more[e] += held.values[step][e] * factors[e];
        store(y + row.first + i, more);
    }
}

// As `normalise_backward`; sums over the warp's rows are in its registers until the last.
template <uint32_t STEPS>
__device__ __forceinline__ void normalise_held_backward(
    const bf16* residual, const bf16* x, const float* added, const float* weight, const bf16* dy, bf16* ds, bf16* dx,
    float* partial, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each, float eps, Dropout dropout
) {
    uint32_t warp = threadIdx.x / WARP, first = blockIdx.x * rows_each, end = min(first + rows_each, rows);
    float dweight[STEPS][FEW] = {}, dbias[STEPS][FEW] = {}, dadded[STEPS][FEW] = {};
    for (uint32_t number = first + warp; number < end; number += blockDim.x / WARP) {
        Row<bf16> row = {residual, x, added, size_t(number) * width, dropout};
        Held<STEPS> held;
        Few<bf16> given[STEPS];
        held.read(row, width, dy, given);
        float factor = held.normalise(width, eps), sum = 0, projection = 0, by[FEW], factors[FEW];
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            if (held.column(step) >= width) continue;
            widen(fetch(weight + held.column(step)), factors);
            widen(given[step], by);
            for (uint32_t e = 0; e < FEW; e++) {
                float normal = held.values[step][e];
                sum += by[e] * factors[e];
                projection += by[e] * factors[e] * normal;
                dweight[step][e] += by[e] * normal;
                dbias[step][e] += by[e];
            }
        }
        sum = warp_sum(sum) / width;
        projection = warp_sum(projection) / width;
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            size_t at = row.first + held.column(step);
            if (held.column(step) >= width) continue;
            widen(fetch(weight + held.column(step)), factors);
            widen(given[step], by);
            for (uint32_t e = 0; e < FEW; e++) by[e] = factor * (by[e] * factors[e] - sum - held.values[step][e] * projection);
            store(ds + at, by);
            if (dropout.limit != 0xffffffffu) {
                for (uint32_t e = 0; e < FEW; e++) by[e] = held.kept >> (step * FEW + e) & 1 ? by[e] * dropout.scale : 0.0f;
            }
            if (dx) store(dx + at, by);
            for (uint32_t e = 0; e < FEW; e++) dadded[step][e] += by[e];
        }
    }
    uint32_t spans = width / FEW, parts = added ? 3 : 2;
    float* own = sums + size_t(warp) * parts * width;
#pragma unroll
    for (uint32_t step = 0; step < STEPS; step++) {
        if (Held<STEPS>::column(step) >= width) continue;
        for (uint32_t e = 0; e < FEW; e++) {
            uint32_t at = e * spans + Held<STEPS>::column(step) / FEW;
            own[at] = dweight[step][e];
            own[width + at] = dbias[step][e];
            if (added) own[2 * width + at] = dadded[step][e];
        }
    }
    add_up_warps(sums, partial, parts, width);
}

// `residual` and `added` may be null; `limit` is that of Dropout, 0xffffffff drops nothing and reads no seed.
#define OF_TYPE(T, suffix)                                                                                                      \
    extern "C" __global__ void layer_norm##suffix(                                                                              \
        const T* residual, const T* x, const float* added, const float* weight, const float* bias, T* y, uint32_t rows,         \
        uint32_t width, float eps, const uint32_t* seed, uint32_t limit, float scale                                            \
    ) {                                                                                                                         \
        normalise(residual, x, added, weight, bias, y, rows, width, eps, seeded(seed, limit, scale));                           \
    }                                                                                                                           \
    extern "C" __global__ void layer_norm_backward##suffix(                                                                     \
        const T* residual, const T* x, const float* added, const float* weight, const T* dy, T* ds, T* dx, float* partial,      \
        uint32_t rows, uint32_t width, uint32_t rows_each, float eps, const uint32_t* seed, uint32_t limit, float scale         \
    ) {                                                                                                                         \
        SHARED(float, sums);                                                                                                    \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        normalise_backward(                                                                                                     \
            residual, x, added, weight, dy, ds, dx, partial, sums, rows, width, rows_each, eps, dropout                         \
        );                                                                                                                      \
    }

OF_TYPE(float, )
OF_TYPE(bf16, _bf16)
#undef OF_TYPE

// Names of these end with STEPS.
#define OF_STEPS(STEPS)                                                                                                         \
    extern "C" __global__ void layer_norm_bf16_##STEPS(                                                                         \
        const bf16* residual, const bf16* x, const float* added, const float* weight, const float* bias, bf16* y,               \
        uint32_t rows, uint32_t width, float eps, const uint32_t* seed, uint32_t limit, float scale                             \
    ) {                                                                                                                         \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        normalise_held<STEPS>(residual, x, added, weight, bias, y, rows, width, eps, dropout);                                  \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(128, STEPS < 4 ? 3 : 2) layer_norm_backward_bf16_##STEPS(                       \
        const bf16* residual, const bf16* x, const float* added, const float* weight, const bf16* dy, bf16* ds, bf16* dx,       \
        float* partial, uint32_t rows, uint32_t width, uint32_t rows_each, float eps, const uint32_t* seed, uint32_t limit,     \
        float scale                                                                                                             \
    ) {                                                                                                                         \
        SHARED(float, sums);                                                                                                    \
        Dropout dropout = seeded(seed, limit, scale);                                                                           \
        normalise_held_backward<STEPS>(                                                                                         \
            residual, x, added, weight, dy, ds, dx, partial, sums, rows, width, rows_each, eps, dropout                         \
        );                                                                                                                      \
    }

OF_STEPS(1)
OF_STEPS(2)
OF_STEPS(3)
OF_STEPS(4)
