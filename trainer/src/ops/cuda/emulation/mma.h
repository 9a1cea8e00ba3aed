// What kernels use of tensor cores (see ../kernels/mma.cuh), as the PTX ISA describes it: each lane has its part of every matrix.
#pragma once

#include <cstring>

#include "cuda.h"

inline uint32_t pair(float first, float second) {
    return uint32_t(__float2bfloat16(first).bits) | uint32_t(__float2bfloat16(second).bits) << 16;
}

inline uint32_t sum_of_pairs(uint32_t a, uint32_t b) {
    auto value = [](uint32_t pair, unsigned shift) { return __bfloat162float({uint16_t(pair >> shift)}); };
    return pair(value(a, 0) + value(b, 0), value(a, 16) + value(b, 16));
}

namespace emulation {

// What every lane of the warp shows to the others at this point.
struct Shown {
    const uint32_t (*lanes)[WORDS_SHOWN];

    // Value `column` of row `row` of the matrix [8, 8] whose rows' pairs the lanes' words `word` are.
    float value(unsigned word, unsigned row, unsigned column) const {
        uint32_t pair = lanes[4 * row + column / 2][word];
        return __bfloat162float({uint16_t(column % 2 ? pair >> 16 : pair)});
    }
};

// A lane reads its row when it comes by: what another thread has not written yet, for want of a barrier, shows.
inline void load_four(uint32_t (&words)[4], const __nv_bfloat16* row, bool turned) {
    uint32_t own[WORDS_SHOWN] = {};
    std::memcpy(own, row, 16);
    // A device demands that, and does not say so where it fails.
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::memset(own, 0xff, 16);
    auto lanes = show(own);
    unsigned lane = thread_number() % 32, of_lane = lane / 4, first = 2 * (lane % 4);
    for (unsigned m = 0; m < 4; m++) {
        auto value = [&](unsigned row, unsigned column) {
            uint32_t pair = lanes[8 * m + row][column / 2];
            return column % 2 ? pair >> 16 : pair & 0xffff;
        };
        words[m] = turned ? value(first, of_lane) | value(first + 1, of_lane) << 16
                          : value(of_lane, first) | value(of_lane, first + 1) << 16;
    }
}

}  // namespace emulation

inline void load_four(uint32_t (&words)[4], const __nv_bfloat16* row) { emulation::load_four(words, row, false); }
inline void load_four_turned(uint32_t (&words)[4], const __nv_bfloat16* row) { emulation::load_four(words, row, true); }

inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t upper, uint32_t lower) {
    const uint32_t own[emulation::WORDS_SHOWN] = {a[0], a[1], a[2], a[3], upper, lower};
    emulation::Shown shown{emulation::show(own)};
    unsigned lane = emulation::thread_number() % 32;
    for (unsigned e = 0; e < 4; e++) {
        unsigned row = lane / 4, below = e / 2, column = 2 * (lane % 4) + e % 2;
        for (unsigned k = 0; k < 16; k++) {
            // b's column is a row of its lanes' words.
            sums[e] += shown.value(below + 2 * (k / 8), row, k % 8) * shown.value(4 + k / 8, column, k % 8);
        }
    }
}
