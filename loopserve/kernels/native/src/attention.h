// Arguments of the attention kernels.
#pragma once
#include <stdint.h>

typedef struct {
    const char *queries, *keys, *values;
    char *output;
    float *lse;  // [heads][rows]
    const uint8_t *verticals, *slashes;  // [heads][total]; NULL: every cell within the window
    const uint8_t *blocks;               // block_sparse: [heads][row tiles][key tiles], `window` rows and keys each
    const int64_t *first_valid;          // [heads / group], or NULL
    const int64_t *columns;              // decode_attention: [heads / group][chosen] sorted columns, -1 before the first
    int64_t query_head, query_row, key_head, key_row, value_head, value_row;  // strides in numbers
    int64_t heads, group, rows, total, dim, window, half, threads;
    int64_t chosen, tail;  // decode_attention: attend these and every column from `tail` on; chosen -1: every column
    float scaling;
} Attention;

