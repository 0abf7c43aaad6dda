// Bounds and codes of keys, page by page, and the arguments of the kernels that use them.
#pragma once
#include <stdint.h>

#include "tile.h"

typedef struct {
    const char *queries;      // [heads][group][tokens][dim]
    const char *keys;         // [heads][columns][dim], of which the pages from `first` on are summarised before they are ranked; or NULL
    char *low, *high;         // [heads][pages][dim]
    uint8_t *codes;           // [heads][pages][page][width]; byte j holds channels j, j + width, ..., the first lowest
    float *logits;            // [heads][rows][columns]
    const int64_t *base;      // [heads][base_count]: sorted columns that are always chosen, all below `tail`
    int64_t *chosen;          // [heads][base_count + budget]: those and the best others, sorted; -1 first where a head has fewer
    float *observed;          // [heads][tail]: the rows' softmax is added, mean over the rows; or NULL
    int64_t *counts;          // [heads]: columns chosen, the base included; -1 where the base has columns outside [0, tail)
    int64_t query_head, query_row, key_head, key_row, bounds_head;  // strides in numbers
    int64_t codes_head;                                                     // in bytes
    int64_t heads, group, tokens, dim, page, bits, columns, first, half, query_half, base_count, tail, budget, least, relative, threads;
    // relative: `least` to `budget` others whose log of a row's softmax reaches the threshold; else the `budget` largest logits.
    float scaling, threshold;
} KeyCodes;

// Rows of `count` keys from channel c on, and their stride.
typedef struct {
    const char *rows;
    int64_t count, row, c, half;
} Keys;

INLINE vf key(const Keys *k, int64_t i) {
    return k->half ? load_bf16((const bf16 *)(k->rows + i * k->row * 2) + k->c) : load((const float *)(k->rows + i * k->row * 4) + k->c);
}

INLINE vf stored(vf x, int64_t half) {
    if (!half) return x;
    bf16 rounded[VW];
    store_bf16(rounded, x);
    return load_bf16(rounded);
}

INLINE vf step_of(vf low, vf high, int most) { return vmax((high - low) / (float)most, splat(1.1754943508222875e-38f)); }

INLINE vf code_of_key(vf x, vf low, vf step, int most) {
    return vmax(-vmax(-((x - low) / step), splat(-most)), (vf){}) + 12582912.0f;  // rounded integer in the low bits
}

// Narrow bounds to the part of their range, in eighths, that codes the keys with the least squared error. An eighth and a half are
// exact, so that a fused multiplication rounds like a separate one.
INLINE void fit(const Keys *k, int most, vf *low, vf *high) {
    vf lowest = *low, middle = (*low + *high) * 0.5f, reach = (*high - *low) * 0.5f, least = {};
    vf eighth = reach * 0.125f, half = reach * 0.5f;
    vf parts[] = {reach, reach - eighth, reach - 2 * eighth, half + eighth, half};
    for (int p = 0; p < 5; p++) {
        vf a = p ? stored(middle - parts[p], k->half) : *low, b = p ? stored(middle + parts[p], k->half) : *high;
        vf step = step_of(a, b, most), error = {};
        for (int64_t i = 0; i < k->count; i++) {
            vf x = key(k, i), off = (code_of_key(x, a, step, most) - 12582912.0f) * step + a - x;
            error += off * off;
        }
        if (p == 0) least = error;
        vi better = error < least;
        least = where(better, error, least), lowest = where(better, a, lowest), *high = where(better, b, *high);
    }
    *low = lowest;
}

// Compute bounds and codes of the pages from k->first on of one head. bits 0: bounds only. Whole pages of 2 bits are fitted.
static void summarise_head(const KeyCodes *k, int64_t head) {
    int64_t dim = k->dim, bits = k->bits, half = k->half, size = half ? 2 : 4, width = dim * bits / 8;
    int64_t pages = (k->columns + k->page - 1) / k->page, per = bits ? 8 / bits : 0;
    int most = (1 << bits) - 1;
    for (int64_t p = k->first; p < pages; p++) {
        const char *rows = k->keys + (head * k->key_head + p * k->page * k->key_row) * size;
        int64_t count = k->columns - p * k->page < k->page ? k->columns - p * k->page : k->page;
        char *lows = k->low + (head * k->bounds_head + p * dim) * size, *highs = k->high + (head * k->bounds_head + p * dim) * size;
        uint8_t *packed = bits ? k->codes + head * k->codes_head + p * k->page * width : NULL;
        Keys keys = {rows, count, k->key_row, 0, half};
        vf bounds[2][dim / VW];
        for (int64_t c = keys.c = 0; c < dim; keys.c = c += VW) {
            vf a = key(&keys, 0), b = a;
            for (int64_t i = 1; i < count; i++) a = -vmax(-a, -key(&keys, i)), b = vmax(b, key(&keys, i));
            if (bits == 2 && count == k->page) fit(&keys, most, &a, &b);
            if (half) store_bf16((bf16 *)lows + c, a), store_bf16((bf16 *)highs + c, b);
            else store((float *)lows + c, a), store((float *)highs + c, b);
            bounds[0][c / VW] = a;
            bounds[1][c / VW] = step_of(a, b, most);
        }
        for (int64_t i = 0; i < count && bits; i++)
            for (int64_t j = 0; j < width; j += VW) {
                vi bytes = {};
                for (int64_t part = 0; part < per; part++) {
                    int64_t c = keys.c = part * width + j;
                    vi code = (vi)code_of_key(key(&keys, i), bounds[0][c / VW], bounds[1][c / VW], most) & 0xffff;
                    bytes |= code << (int)(part * bits);
                }
                *(vb_loose *)(packed + i * width + j) = __builtin_convertvector(bytes, vb_loose);
            }
    }
}
