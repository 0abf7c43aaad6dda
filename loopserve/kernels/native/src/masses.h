// Sum softmax rows, and replace numbers that are not finite.
#pragma once
#include <math.h>

#include "tile.h"

static __attribute__((unused)) double sum_of_row(const float *row, int64_t count) {
    double sum = 0;
    int64_t k = 0;
    while (k + 64 * VW <= count) {  // short sums in float, their total in double
        vf parts[4] = {{}};
        for (int64_t to = k + 64 * VW; k < to; k += 4 * VW)
            UNROLL for (int v = 0; v < 4; v++) parts[v] += load(row + k + v * VW);
        sum += sum_of((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
    for (; k < count; k++) sum += row[k];
    return sum;
}

// Copy rows [rows][total], `stride` numbers apart, to `to`, with 0 for numbers that are not finite.
static __attribute__((unused)) void finite_rows(const float *from, float *to, int64_t rows, int64_t total, int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < total; k++) to[i * stride + k] = isfinite(from[i * stride + k]) ? from[i * stride + k] : 0;
}
