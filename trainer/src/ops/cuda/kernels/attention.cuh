// What the kernels of attention share: who sees whom.
#pragma once

#include "device.cuh"

// Queries of one block of rows that attend alike; rows count from the start of the batch.
struct QueryTile {
    uint32_t first, count;           // the queries
    uint32_t block, rows;            // all rows of their block
    uint32_t context, context_rows;  // what every one of them sees before these
    uint32_t causal;                 // whether a row sees, of its block, only itself and what precedes it
    uint32_t unused;
};

// Keys that are seen by the same blocks.
struct KeyTile {
    uint32_t first, count;
    uint32_t segment, segments;  // who sees them
};

// A block of rows that sees a key tile.
struct Segment {
    uint32_t block, rows;
    uint32_t width, column;       // of its probabilities: all columns, and that of the tile's first key
    uint32_t causal, first_seen;  // if causal, key k of the tile is seen by rows first_seen + k and later
};

// Draws of one block of rows and head: `Attention::drop` of ../../attention.rs.
__device__ __forceinline__ Dropout of_block(Dropout of_pass, uint32_t block, uint32_t head) {
    return {of_pass.seed ^ (block * 0x85ebca6bu) ^ (head * 0xc2b2ae35u), of_pass.limit, of_pass.scale};
}
