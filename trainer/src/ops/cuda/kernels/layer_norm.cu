// LayerNorm of a sum: y = (s − mean) / √(var + eps) · weight + bias, s = residual + dropout(x + added), `added` being the bias of the
// product that x is. A warp works on a row.
#include "device.cuh"

// Values of one row before the normalisation; made anew where they are needed, which costs less than keeping them.
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

// Writes ds, the gradient by the sum, and dx, that by x where it differs (null where it does not). A block takes `rows_each`
// rows; row blockIdx.x of `partial` [blocks, 2, width] receives their share of the gradients by weight and bias, and where there is
// something added, that by it: [blocks, 3, width].
template <typename T>
__device__ __forceinline__ void normalise_backward(
    const T* residual, const T* x, const float* added, const float* weight, const T* dy, T* ds, T* dx, float* partial,
    float* sums, uint32_t rows, uint32_t width, uint32_t rows_each, float eps, Dropout dropout
) {
    // sums [warps, 2 or 3, FEW, spans]: neighbouring lanes add to neighbouring values.
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
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < parts * width; i += blockDim.x) {
        uint32_t column = i % width, place = (i / width * FEW + column % FEW) * spans + column / FEW;
        float sum = 0;
        for (uint32_t other = 0; other < warps; other++) sum += sums[size_t(other) * of_warp + place];
        partial[size_t(blockIdx.x) * parts * width + i] = sum;
    }
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
