// Rows of a matrix: chosen, summed up. Sums run in a fixed order, so that a run repeats bit by bit.
#include "device.cuh"

// Added to the square of a row's length, as on the CPU.
constexpr float LEAST_SQUARE = 1e-12f;

// Row r of y is row ids[r] of the table. A thread has FEW columns of a row.
template <typename T>
__device__ __forceinline__ void select(const T* table, const uint32_t* ids, float* y, uint32_t rows, uint32_t width) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t row = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (row >= rows) return;
    float values[FEW];
    read_few(table + size_t(ids[row]) * width + column, count, values);
    write_few(y + size_t(row) * width + column, count, values);
}

// The backward pass of rows that were chosen several times over: row r of y is the sum of the rows that `chosen` lists from starts[r]
// to starts[r + 1], zeros where there are none. A thread has FEW columns of a row.
template <typename T>
__device__ __forceinline__ void spread(
    const uint32_t* starts, const float* const* chosen, T* y, uint32_t rows, uint32_t width
) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t row = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (row >= rows) return;
    float sum[FEW] = {}, values[FEW];
    for (uint32_t i = starts[row]; i < starts[row + 1]; i++) {
        read_few(chosen[i] + column, count, values);
        for (uint32_t e = 0; e < FEW; e++) sum[e] += values[e];
    }
    write_few(y + size_t(row) * width + column, count, sum);
}

// In tables of rows, for one that is none.
constexpr uint32_t NO_ROW = 0xffffffff;

// Row r of y is row a[r] of the first table and row b[r] of the second, added up. A thread has FEW columns of a row.
extern "C" __global__ void select_sums(
    const float* first, const uint32_t* a, const float* second, const uint32_t* b, float* y, uint32_t rows, uint32_t width
) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t row = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (row >= rows) return;
    float values[FEW], others[FEW];
    read_few(first + size_t(a[row]) * width + column, count, values);
    read_few(second + size_t(b[row]) * width + column, count, others);
    for (uint32_t e = 0; e < FEW; e++) values[e] += others[e];
    write_few(y + size_t(row) * width + column, count, values);
}

// What rows of two arrays are packed into: row r of y is row order[r] of both, one behind the other, with values dropped out, or
// zeros where that is none. A thread has FEW columns of a row.
template <typename T>
__device__ __forceinline__ void pack(
    const float* first, const float* second, uint32_t of_first, const uint32_t* order, T* y, uint32_t rows, uint32_t width,
    Dropout dropout
) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t row = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (row >= rows) return;
    uint32_t source = order[row];
    float values[FEW] = {};
    if (source != NO_ROW) {
        const float* from = source < of_first ? first + size_t(source) * width : second + size_t(source - of_first) * width;
        read_few(from + column, count, values);
        if (dropout.limit != 0xffffffffu) {
            for (uint32_t e = 0; e < FEW; e++) values[e] = dropout(values[e], row * width + column + e);
        }
    }
    write_few(y + size_t(row) * width + column, count, values);
}

// The backward pass: rows of both arrays, one behind the other, of which row s is packed as row places[s]; zeros where that is none.
template <typename T>
__device__ __forceinline__ void pack_backward(
    const T* dy, float* by_first, float* by_second, uint32_t of_first, const uint32_t* places, uint32_t sources, uint32_t width,
    Dropout dropout
) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t source = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (source >= sources) return;
    uint32_t row = places[source];
    float values[FEW] = {};
    if (row != NO_ROW) {
        read_few(dy + size_t(row) * width + column, count, values);
        if (dropout.limit != 0xffffffffu) {
            for (uint32_t e = 0; e < FEW; e++) values[e] = dropout(values[e], row * width + column + e);
        }
    }
    float* to = source < of_first ? by_first + size_t(source) * width : by_second + size_t(source - of_first) * width;
    write_few(to + column, count, values);
}

#define OF_TYPE(T, suffix)                                                                                                      \
    extern "C" __global__ void pack_rows##suffix(                                                                               \
        const float* first, const float* second, uint32_t of_first, const uint32_t* order, T* y, uint32_t rows, uint32_t width, \
        const uint32_t* seed, uint32_t limit, float scale                                                                       \
    ) {                                                                                                                         \
        pack(first, second, of_first, order, y, rows, width, seeded(seed, limit, scale));                                       \
    }                                                                                                                           \
    extern "C" __global__ void pack_rows_backward##suffix(                                                                      \
        const T* dy, float* by_first, float* by_second, uint32_t of_first, const uint32_t* places, uint32_t sources,            \
        uint32_t width, const uint32_t* seed, uint32_t limit, float scale                                                       \
    ) {                                                                                                                         \
        pack_backward(dy, by_first, by_second, of_first, places, sources, width, seeded(seed, limit, scale));                   \
    }                                                                                                                           \
    extern "C" __global__ void select_rows##suffix(                                                                             \
        const T* table, const uint32_t* ids, float* y, uint32_t rows, uint32_t width                                            \
    ) {                                                                                                                         \
        select(table, ids, y, rows, width);                                                                                     \
    }                                                                                                                           \
    extern "C" __global__ void spread_rows##suffix(                                                                             \
        const uint32_t* starts, const float* const* chosen, T* y, uint32_t rows, uint32_t width                                 \
    ) {                                                                                                                         \
        spread(starts, chosen, y, rows, width);                                                                                 \
    }

OF_TYPE(float, )
OF_TYPE(bf16, _bf16)
#undef OF_TYPE

// The backward pass: dtable[sources[s]] is the sum of the rows of dy that `order` lists from starts[s] to starts[s + 1]; nothing
// where that is no row. Rows that nobody chose are left alone. A block has eight warps and makes 32 columns of one row: blockIdx.x is s.
extern "C" __global__ void sum_rows(
    const float* dy, const uint32_t* order, const uint32_t* starts, const uint32_t* sources, float* dtable, uint32_t width
) {
    SHARED(float, partial);  // [warps, 32]
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    uint32_t column = blockIdx.y * WARP + lane;
    if (sources[blockIdx.x] == NO_ROW) return;
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

// sums[blockIdx.y] is the sum of the block's rows of values [rows, width]. A block has `spans` times FEW columns, or all if they are
// fewer, and its threads share out the rows, in turns, and add up in the order of these.
template <typename T>
__device__ __forceinline__ void sum_columns(
    const T* values, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each, uint32_t spans
) {
    SHARED(float, of_threads);  // [FEW, threads]
    spans = min((width + FEW - 1) / FEW, spans);
    uint32_t turns = blockDim.x / spans;
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

extern "C" __global__ void column_sums(
    const float* values, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each, uint32_t spans
) {
    sum_columns(values, sums, rows, width, rows_each, spans);
}

extern "C" __global__ void column_sums_bf16(
    const bf16* values, float* sums, uint32_t rows, uint32_t width, uint32_t rows_each, uint32_t spans
) {
    sum_columns(values, sums, rows, width, rows_each, spans);
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

// Of texts whose rows x has from starts[text] on to starts[text + 1]: the first row, and beside it the mean of the others. A thread has
// FEW columns of a text.
extern "C" __global__ void first_and_mean(const float* x, const uint32_t* starts, float* y, uint32_t texts, uint32_t width) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t text = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (text >= texts) return;
    uint32_t first = starts[text], end = starts[text + 1];
    float values[FEW], sum[FEW] = {}, share = 1.0f / (end - first - 1);
    float* to = y + size_t(text) * 2 * width + column;
    read_few(x + size_t(first) * width + column, count, values);
    write_few(to, count, values);
    for (uint32_t row = first + 1; row < end; row++) {
        read_few(x + size_t(row) * width + column, count, values);
        for (uint32_t e = 0; e < FEW; e++) sum[e] += values[e];
    }
    for (uint32_t e = 0; e < FEW; e++) sum[e] *= share;
    write_few(to + width, count, sum);
}

extern "C" __global__ void first_and_mean_backward(
    const float* dy, const uint32_t* starts, const uint32_t* of_rows, float* dx, uint32_t rows, uint32_t width
) {
    uint32_t spans = (width + FEW - 1) / FEW, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t row = place / spans, column = place % spans * FEW, count = min(FEW, width - column);
    if (row >= rows) return;
    uint32_t text = of_rows[row], first = starts[text];
    bool is_first = row == first;
    float values[FEW], share = is_first ? 1.0f : 1.0f / (starts[text + 1] - first - 1);
    read_few(dy + (size_t(text) * 2 + (is_first ? 0 : 1)) * width + column, count, values);
    for (uint32_t e = 0; e < FEW; e++) values[e] *= share;
    write_few(dx + size_t(row) * width + column, count, values);
}

// What a row's softmax over x / temperature gives to the columns that have the row's number: of all columns and of those alone the
// largest value and the sum of exponentials, and the logarithm of the share. A block works on a row.
struct Share {
    float turn, most, sum, most_own, sum_own;

    __device__ __forceinline__ Share(
        const float* x, uint32_t width, const float* temperature, uint32_t number, const uint32_t* columns, float* partial
    )
        : turn(1.0f / *temperature), most(-INFINITY), sum(0), most_own(-INFINITY), sum_own(0) {
        for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
            most = fmaxf(most, x[i]);
            if (columns[i] == number) most_own = fmaxf(most_own, x[i]);
        }
        most = block_max(most, partial);
        most_own = block_max(most_own, partial);
        for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
            sum += expf((x[i] - most) * turn);
            if (columns[i] == number) sum_own += expf((x[i] - most_own) * turn);
        }
        sum = block_sum(sum, partial);
        sum_own = block_sum(sum_own, partial);
    }

    // Whether the row has columns of its own; only then has it a share.
    __device__ __forceinline__ bool is_there() const { return sum_own > 0; }

    __device__ __forceinline__ float logarithm() const { return (most_own - most) * turn + logf(sum_own) - logf(sum); }
};

// values[row] = ln(share + least), or the share's own logarithm where `least` is 0, which no small share is lost in; 0 of a row without
// columns of its own. `numbers` are those of the rows, then those of the columns.
extern "C" __global__ void log_shares(
    const float* x, const float* temperature, const uint32_t* numbers, float* values, uint32_t width, float least
) {
    SHARED(float, partial);
    Share share(x + size_t(blockIdx.x) * width, width, temperature, numbers[blockIdx.x], numbers + gridDim.x, partial);
    float logarithm = least > 0 ? logf(expf(share.logarithm()) + least) : share.logarithm();
    if (threadIdx.x == 0) values[blockIdx.x] = share.is_there() ? logarithm : 0.0f;
}

// Gradients of `factor` times the sum of the values of log_shares, of which `dy` is the gradient by that: by x, and each row's part of
// that by the temperature.
extern "C" __global__ void log_shares_backward(
    const float* x, const float* temperature, const uint32_t* numbers, const float* dy, float* dx, float* by_temperature,
    uint32_t width, float least, float factor
) {
    SHARED(float, partial);
    const float* row = x + size_t(blockIdx.x) * width;
    uint32_t number = numbers[blockIdx.x];
    const uint32_t* columns = numbers + gridDim.x;
    Share share(row, width, temperature, number, columns, partial);
    float of_row = 0, by = share.is_there() ? *dy * factor : 0.0f;
    if (least > 0) {
        float value = expf(share.logarithm());
        by = share.is_there() ? by * value / (value + least) : 0.0f;
    }
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        float own = columns[i] == number ? expf((row[i] - share.most_own) * share.turn) / share.sum_own : 0.0f;
        float of_score = by * (own - expf((row[i] - share.most) * share.turn) / share.sum);
        dx[size_t(blockIdx.x) * width + i] = of_score * share.turn;
        of_row -= of_score * row[i];
    }
    of_row = block_sum(of_row, partial) * share.turn * share.turn;
    if (threadIdx.x == 0) by_temperature[blockIdx.x] = of_row;
}

// A piece of an array that goes to `to[at]` and on: blockIdx.x is its number.
struct Copied {
    const float* from;
    uint32_t at, count;
};

extern "C" __global__ void gather_pieces(const Copied* pieces, float* to) {
    Copied piece = pieces[blockIdx.x];
    float some[FEW];
    for (uint32_t i = threadIdx.x * FEW; i < piece.count; i += blockDim.x * FEW) {
        read_few(piece.from + i, piece.count - i, some);
        write_few(to + piece.at + i, piece.count - i, some);
    }
}

// result[0] = factor · Σ values, in one block.
extern "C" __global__ void total(const float* values, float* result, uint32_t count, float factor) {
    SHARED(float, partial);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) result[0] = factor * sum;
}
