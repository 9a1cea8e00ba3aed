// Rows of a matrix: chosen, summed up. Sums run in a fixed order, so that a run repeats bit by bit.
#include "device.cuh"

// Added to the square of a row's length, as on the CPU.
constexpr float LEAST_SQUARE = 1e-12f;

// y[i] = table[ids[i]], rows of `width` values.
extern "C" __global__ void select_rows(const float* table, const uint32_t* ids, float* y, size_t count, uint32_t width) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        y[i] = table[size_t(ids[i / width]) * width + i % width];
    }
}

// The backward pass: dtable[sources[s]] is the sum of the rows of dy that `order` lists from starts[s] to starts[s + 1]. Rows
// that nobody chose are left alone. A block has eight warps and makes 32 columns of one row: blockIdx.x is s.
extern "C" __global__ void sum_rows(
    const float* dy, const uint32_t* order, const uint32_t* starts, const uint32_t* sources, float* dtable, uint32_t width
) {
    SHARED(float, partial);  // [warps, 32]
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    uint32_t column = blockIdx.y * WARP + lane;
    float sum = 0;
    if (column < width) {
        uint32_t end = starts[blockIdx.x + 1];
        for (uint32_t i = starts[blockIdx.x] + warp; i < end; i += warps) sum += dy[size_t(order[i]) * width + column];
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
        for (uint32_t other = 1; other < warps; other++) sum += partial[other * WARP + lane];
        dtable[size_t(sources[blockIdx.x]) * width + column] = sum;
    }
}

// sums[blockIdx.y] is the sum of the block's rows of values [rows, width]. A block has the columns of a warp, or all if they are fewer,
// and its threads share out the rows, in turns, and add up in the order of these.
template <typename T>
__device__ __forceinline__ void sum_columns(const T* values, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each) {
    SHARED(float, of_threads);  // [FEW, threads]
    uint32_t spans = min((width + FEW - 1) / FEW, WARP), turns = blockDim.x / spans;
    uint32_t turn = threadIdx.x / spans, column = (blockIdx.x * spans + threadIdx.x % spans) * FEW;
    uint32_t count = turn < turns && column < width ? min(FEW, width - column) : 0;
    uint32_t first = blockIdx.y * rows_each, end = min(first + rows_each, rows);
    float sum[FEW] = {}, some[FEW];
    if (count > 0) {
#pragma unroll 4
        for (uint32_t row = first + turn; row < end; row += turns) {
            read_few(values + size_t(row) * width + column, count, some);
            for (uint32_t e = 0; e < FEW; e++) sum[e] += some[e];
        }
    }
    for (uint32_t e = 0; e < FEW; e++) of_threads[e * blockDim.x + threadIdx.x] = sum[e];
    __syncthreads();
    if (turn > 0 || count == 0) return;
    for (uint32_t other = 1; other < turns; other++) {
        for (uint32_t e = 0; e < FEW; e++) sum[e] += of_threads[e * blockDim.x + other * spans + threadIdx.x];
    }
    write_few(sums + size_t(blockIdx.y) * width + column, count, sum);
}

extern "C" __global__ void column_sums(const float* values, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each) {
    sum_columns(values, sums, rows, width, rows_each);
}

extern "C" __global__ void column_sums_bf16(const bf16* values, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each) {
    sum_columns(values, sums, rows, width, rows_each);
}

// Each row over its length, a warp for a row.
extern "C" __global__ void unit_rows(const float* x, float* y, uint32_t rows, uint32_t width) {
    uint32_t row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float square = 0;
    for (uint32_t i = lane; i < width; i += WARP) square += x[size_t(row) * width + i] * x[size_t(row) * width + i];
    float length = sqrtf(warp_sum(square) + LEAST_SQUARE);
    for (uint32_t i = lane; i < width; i += WARP) y[size_t(row) * width + i] = x[size_t(row) * width + i] / length;
}

// dx = (dy − y (y · dy)) / length
extern "C" __global__ void unit_rows_backward(
    const float* x, const float* y, const float* dy, float* dx, uint32_t rows, uint32_t width
) {
    uint32_t row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    size_t first = size_t(row) * width;
    float square = 0, along = 0;
    for (uint32_t i = lane; i < width; i += WARP) {
        square += x[first + i] * x[first + i];
        along += y[first + i] * dy[first + i];
    }
    float length = sqrtf(warp_sum(square) + LEAST_SQUARE);
    along = warp_sum(along);
    for (uint32_t i = lane; i < width; i += WARP) dx[first + i] = (dy[first + i] - y[first + i] * along) / length;
}

// Logarithms of the softmax of each row, a block for a row.
extern "C" __global__ void log_softmax(const float* x, float* y, uint32_t width) {
    SHARED(float, partial);
    size_t first = size_t(blockIdx.x) * width;
    float most = -INFINITY, sum = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) most = fmaxf(most, x[first + i]);
    most = block_max(most, partial);
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) sum += expf(x[first + i] - most);
    float all = most + logf(block_sum(sum, partial));
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) y[first + i] = x[first + i] - all;
}

extern "C" __global__ void log_softmax_backward(const float* y, const float* dy, float* dx, uint32_t width) {
    SHARED(float, partial);
    size_t first = size_t(blockIdx.x) * width;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) sum += dy[first + i];
    sum = block_sum(sum, partial);
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) dx[first + i] = dy[first + i] - expf(y[first + i]) * sum;
}

// A piece of an array that goes to `to[at]` and on: blockIdx.x is its number.
struct Copied {
    const float* from;
    uint32_t at, count;
};

extern "C" __global__ void gather_pieces(const Copied* pieces, float* to) {
    Copied piece = pieces[blockIdx.x];
    for (uint32_t i = threadIdx.x; i < piece.count; i += blockDim.x) to[piece.at + i] = piece.from[i];
}

// result[0] = factor · Σ values, in one block.
extern "C" __global__ void total(const float* values, float* result, uint32_t count, float factor) {
    SHARED(float, partial);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) result[0] = factor * sum;
}
