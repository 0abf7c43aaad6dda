// Compute attention cell by cell, for few rows or scattered keys, with channels in the vector lanes.
#pragma once
#include "tile.h"

// Return the scores of VW rows with one key each.
INLINE vf row_products(const char *const *rows, const char *const *keys, int64_t dim, int half) {
    vf sums[VW];
#if LS_BF16
    if (half) {
        UNROLL for (int r = 0; r < VW; r++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < dim; d += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(rows[r] + 2 * d),
                                       (__m512bh)_mm512_loadu_si512(keys[r] + 2 * d));
            sums[r] = (vf)sum;
        }
        return sums_of(sums);
    }
#endif
    for (int r = 0; r < VW; r++) {
        vf sum = {};
        for (int64_t d = 0; d < dim; d += VW)
            sum += half ? load_bf16((const bf16 *)rows[r] + d) * load_bf16((const bf16 *)keys[r] + d)
                        : load((const float *)rows[r] + d) * load((const float *)keys[r] + d);
        sums[r] = sum;
    }
    return sums_of(sums);
}

// Add to output [dim] the values of the keys of one row, weighted.
INLINE void add_row(float *output, const float *weights, const char *const *values, int64_t count, int64_t dim, int half) {
    int64_t d = 0;
    for (; d + 4 * VW <= dim; d += 4 * VW) {
        vf sums[4];
        UNROLL for (int v = 0; v < 4; v++) sums[v] = (vf){};
        for (int64_t i = 0; i < count; i++) {
            vf weight = splat(weights[i]);
            UNROLL for (int v = 0; v < 4; v++)
                sums[v] += weight * (half ? load_bf16((const bf16 *)values[i] + d + v * VW)
                                          : load((const float *)values[i] + d + v * VW));
        }
        UNROLL for (int v = 0; v < 4; v++) store(output + d + v * VW, load(output + d + v * VW) + sums[v]);
    }
    for (; d < dim; d += VW) {
        vf sum = {};
        for (int64_t i = 0; i < count; i++)
            sum += splat(weights[i]) *
                   (half ? load_bf16((const bf16 *)values[i] + d) : load((const float *)values[i] + d));
        store(output + d, load(output + d) + sum);
    }
}

