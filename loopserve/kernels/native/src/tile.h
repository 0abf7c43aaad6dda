// Attention of one tile of rows over any list of keys: products, online softmax, weighted values.
//
// Rows lie in the lanes of vectors, keys one after another: scores are S[key][row], the output is O[d][row]. So keys and values
// are read where they are stored, row by row, in any order and with any gaps; the running maximum and sum of a row stay in its
// lane; and a mask that depends on row minus key is a contiguous load.
#pragma once
#include <stdlib.h>

#include "vec.h"

#define ROWS 64               // rows of a tile
#define ROW_VECTORS (ROWS / VW)
#define SLICE (ROW_VECTORS < 4 ? ROW_VECTORS : 4)  // vectors of rows per inner product kernel
#define KEYS 64               // keys of a block: its scores stay in the first-level cache
#define NK (VW == 8 ? 2 : 4)  // keys per inner product kernel: as many sums as fit the registers
#define ND (VW == 8 ? 2 : 4)

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

typedef struct {
    int64_t dim;      // channels of queries, keys and values
    int half;         // the numbers are bfloat16
    int pairs;        // ... and multiplied in pairs by the processor
    float scale;      // of scores, times log2(e): the softmax is in powers of 2
    void *queries;    // packed: float [dim][ROWS], or pairs [dim / 2][ROWS]
    float *scores;    // [KEYS][ROWS]
    uint32_t *weights;  // pairs of bfloat16 [KEYS / 2][ROWS]
    void *values;     // pairs [KEYS / 2][dim], or float [KEYS][dim] for numbers that were half
    float *keys;      // float [KEYS][dim] for numbers that were half
    float *output;    // [dim][ROWS]
    float *most, *sum;  // [ROWS]: running maximum of the scores, running sum of their powers
    int count;        // keys waiting in the block
    const char *key[KEYS], *value[KEYS];
    const float *bias[KEYS];  // added to the row's scores (0 or -inf), or none
} Tile;

static const float nothing[ROWS] __attribute__((unused)) = {
#define N4 -INFINITY, -INFINITY, -INFINITY, -INFINITY
#define N16 N4, N4, N4, N4
    N16, N16, N16, N16};

static inline __attribute__((unused)) void *room(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64 + 64); }

static __attribute__((unused)) int tile_open(Tile *t, int64_t dim, int half, float scale) {
    t->dim = dim, t->half = half, t->scale = scale * LOG2E;
    t->pairs = half && LS_BF16;
    t->queries = room(dim * ROWS * 4), t->scores = room(KEYS * ROWS * 4), t->weights = room(KEYS / 2 * ROWS * 4);
    t->values = room(KEYS * dim * 4), t->keys = room(KEYS * dim * 4), t->output = room(dim * ROWS * 4);
    t->most = room(ROWS * 4), t->sum = room(ROWS * 4);
    return t->queries && t->scores && t->weights && t->values && t->keys && t->output && t->most && t->sum;
}

static __attribute__((unused)) void tile_close(Tile *t) {
    free(t->queries), free(t->scores), free(t->weights), free(t->values), free(t->keys), free(t->output);
    free(t->most), free(t->sum);
}

// Begin a tile: rows [rows][dim] at a stride in numbers; rows that are missing are zero.
static __attribute__((unused)) void tile_begin(Tile *t, const char *rows, int64_t count, int64_t stride) {
    int64_t dim = t->dim, words = t->pairs ? dim / 2 : dim;  // a word is a number or a pair
    int64_t step = stride * (t->half ? 2 : 4);
    float *packed = t->queries;
    for (int64_t r = 0; r < ROWS; r += VW)
        for (int64_t d = 0; d < words; d += VW) {
            vf block[VW];
            for (int i = 0; i < VW; i++) {
                const char *row = rows + (r + i) * step;
                block[i] = r + i >= count         ? (vf){}
                           : t->half && !t->pairs ? load_bf16((const bf16 *)row + d)
                                                  : load((const float *)row + d);
            }
            transpose(block);
            for (int i = 0; i < VW; i++) store(packed + (d + i) * ROWS + r, block[i]);
        }
    memset(t->output, 0, dim * ROWS * 4);
    for (int r = 0; r < ROWS; r++) t->most[r] = -INFINITY, t->sum[r] = 0;
    t->count = 0;
}

#if LS_BF16
static __attribute__((unused)) void products_pairs(const Tile *t, int count, float *scores) {
    const uint32_t *queries = t->queries;
    int64_t steps = t->dim / 2;
    for (int j = 0; j < count; j += NK) {
        const int32_t *key[NK];
        UNROLL for (int i = 0; i < NK; i++) key[i] = (const int32_t *)t->key[j + i];
        vf sums[NK][SLICE];
        UNROLL for (int i = 0; i < NK; i++) UNROLL for (int v = 0; v < SLICE; v++) sums[i][v] = (vf){};
        for (int64_t d = 0; d < steps; d++) {
            __m512bh query[SLICE];
            UNROLL for (int v = 0; v < SLICE; v++) query[v] = (__m512bh)load((const float *)queries + d * ROWS + v * VW);
            UNROLL for (int i = 0; i < NK; i++) {
                int32_t bits;
                memcpy(&bits, key[i] + d, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(bits);
                UNROLL for (int v = 0; v < SLICE; v++) sums[i][v] = (vf)_mm512_dpbf16_ps((__m512)sums[i][v], query[v], both);
            }
        }
        UNROLL for (int i = 0; i < NK; i++) UNROLL for (int v = 0; v < SLICE; v++)
            store(scores + (j + i) * ROWS + v * VW, sums[i][v]);
    }
}

static void add_values_pairs(Tile *t, int count) {
    const uint32_t *values = t->values;
    for (int64_t d = 0; d < t->dim; d += ND) {
        vf sums[ND][SLICE];
        UNROLL for (int i = 0; i < ND; i++) UNROLL for (int v = 0; v < SLICE; v++)
            sums[i][v] = load(t->output + (d + i) * ROWS + v * VW);
        for (int k = 0; k < count / 2; k++) {
            __m512bh weight[SLICE];
            UNROLL for (int v = 0; v < SLICE; v++) weight[v] = (__m512bh)load((const float *)t->weights + k * ROWS + v * VW);
            UNROLL for (int i = 0; i < ND; i++) {
                __m512bh both = (__m512bh)_mm512_set1_epi32((int)values[k * t->dim + d + i]);
                UNROLL for (int v = 0; v < SLICE; v++) sums[i][v] = (vf)_mm512_dpbf16_ps((__m512)sums[i][v], weight[v], both);
            }
        }
        UNROLL for (int i = 0; i < ND; i++) UNROLL for (int v = 0; v < SLICE; v++)
            store(t->output + (d + i) * ROWS + v * VW, sums[i][v]);
    }
}

// Values of two keys, channel by channel side by side: [count / 2][dim].
static void pair_values(Tile *t, int count) {
    uint32_t *values = t->values;
    for (int k = 0; k < count; k += 2) {
        const bf16 *first = (const bf16 *)t->value[k], *second = (const bf16 *)t->value[k + 1];
        for (int64_t d = 0; d < t->dim; d += 16) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(first + d)));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(second + d)));
            _mm512_storeu_si512(values + k / 2 * t->dim + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

static void pair_weights(Tile *t, int count) {
    for (int k = 0; k < count / 2; k++)
        UNROLL for (int v = 0; v < ROW_VECTORS; v++) {
            __m512i first = _mm512_castps_si512(_mm512_loadu_ps(t->scores + 2 * k * ROWS + v * VW));
            __m512i second = _mm512_castps_si512(_mm512_loadu_ps(t->scores + (2 * k + 1) * ROWS + v * VW));
            __m512i half = _mm512_set1_epi32(0x8000);  // weights lie in [0, 1]: adding half a step rounds them
            first = _mm512_srli_epi32(_mm512_add_epi32(first, half), 16);
            second = _mm512_add_epi32(second, half);
            _mm512_storeu_si512(t->weights + k * ROWS + v * VW, _mm512_mask_blend_epi16(0xAAAAAAAA, first, second));
        }
}
#endif

static __attribute__((unused)) void products(const Tile *t, int count, float *scores) {
    const float *queries = t->queries;
    for (int j = 0; j < count; j += NK)
        for (int part = 0; part < ROW_VECTORS; part += SLICE) {
            const float *key[NK];
            UNROLL for (int i = 0; i < NK; i++) key[i] = (const float *)t->key[j + i];
            vf sums[NK][SLICE];
            UNROLL for (int i = 0; i < NK; i++) UNROLL for (int v = 0; v < SLICE; v++) sums[i][v] = (vf){};
            for (int64_t d = 0; d < t->dim; d++) {
                vf query[SLICE];
                UNROLL for (int v = 0; v < SLICE; v++) query[v] = load(queries + d * ROWS + (part + v) * VW);
                UNROLL for (int i = 0; i < NK; i++) {
                    vf one = splat(key[i][d]);
                    UNROLL for (int v = 0; v < SLICE; v++) sums[i][v] += query[v] * one;
                }
            }
            UNROLL for (int i = 0; i < NK; i++) UNROLL for (int v = 0; v < SLICE; v++)
                store(scores + (j + i) * ROWS + (part + v) * VW, sums[i][v]);
        }
}

static void add_values(Tile *t, int count) {
    for (int64_t d = 0; d < t->dim; d += ND)
        for (int part = 0; part < ROW_VECTORS; part += SLICE) {
            vf sums[ND][SLICE];
            UNROLL for (int i = 0; i < ND; i++) UNROLL for (int v = 0; v < SLICE; v++)
                sums[i][v] = load(t->output + (d + i) * ROWS + (part + v) * VW);
            for (int k = 0; k < count; k++) {
                const float *value = (const float *)t->value[k] + d;
                vf weight[SLICE];
                UNROLL for (int v = 0; v < SLICE; v++) weight[v] = load(t->scores + k * ROWS + (part + v) * VW);
                UNROLL for (int i = 0; i < ND; i++) {
                    vf one = splat(value[i]);
                    UNROLL for (int v = 0; v < SLICE; v++) sums[i][v] += weight[v] * one;
                }
            }
            UNROLL for (int i = 0; i < ND; i++) UNROLL for (int v = 0; v < SLICE; v++)
                store(t->output + (d + i) * ROWS + (part + v) * VW, sums[i][v]);
        }
}

// Rows of half numbers as floats, for processors that do not multiply them.
static void widen(const char **from, float *to, int count, int64_t dim) {
    for (int k = 0; k < count; k++) {
        for (int64_t d = 0; d < dim; d += VW) store(to + k * dim + d, load_bf16((const bf16 *)from[k] + d));
        from[k] = (const char *)(to + k * dim);
    }
}

// Scores become weights; the running maximum and sum of each row move on, and with them what the output was scaled by.
static void tile_softmax(Tile *t, int count) {
    for (int part = 0; part < ROW_VECTORS; part += SLICE) {  // several vectors at once, since each step waits for the last
        float *scores = t->scores + part * VW;
        vf before[SLICE], most[SLICE], sum[SLICE], base[SLICE];
        UNROLL for (int v = 0; v < SLICE; v++) {
            before[v] = most[v] = load(t->most + (part + v) * VW);
            sum[v] = load(t->sum + (part + v) * VW);
        }
        for (int k = 0; k < count; k++) {
            vf score[SLICE];
            UNROLL for (int v = 0; v < SLICE; v++) score[v] = load(scores + k * ROWS + v * VW) * t->scale;
            if (t->bias[k]) UNROLL for (int v = 0; v < SLICE; v++) score[v] += load(t->bias[k] + (part + v) * VW);
            UNROLL for (int v = 0; v < SLICE; v++) store(scores + k * ROWS + v * VW, score[v]);
            UNROLL for (int v = 0; v < SLICE; v++) most[v] = vmax(most[v], score[v]);
        }
        UNROLL for (int v = 0; v < SLICE; v++) {
            base[v] = where(most[v] == -INFINITY, (vf){}, most[v]);
            if (any(most[v] > before[v])) {
                vf shrink = exp2v(before[v] - base[v]);
                sum[v] *= shrink;
                store(t->most + (part + v) * VW, most[v]);
                for (int64_t d = 0; d < t->dim; d++) {
                    float *at = t->output + d * ROWS + (part + v) * VW;
                    store(at, load(at) * shrink);
                }
            }
        }
        for (int k = 0; k < count; k++)
            UNROLL for (int v = 0; v < SLICE; v++) {
                vf weight = exp2v(load(scores + k * ROWS + v * VW) - base[v]);
                sum[v] += weight;
                store(scores + k * ROWS + v * VW, weight);
            }
        UNROLL for (int v = 0; v < SLICE; v++) store(t->sum + (part + v) * VW, sum[v]);
    }
}

// Attend to the keys that wait in the block.
static __attribute__((unused)) void tile_flush(Tile *t) {
    int count = t->count;
    if (!count) return;
    while (count % NK || count % 2) {  // a repeated key that no row sees
        t->key[count] = t->key[count - 1], t->value[count] = t->value[count - 1], t->bias[count] = nothing;
        count++;
    }
    t->count = 0;
#if LS_BF16
    if (t->pairs) {
        products_pairs(t, count, t->scores);
        tile_softmax(t, count);
        pair_weights(t, count);
        pair_values(t, count);
        add_values_pairs(t, count);
        return;
    }
#endif
    if (t->half) {
        widen(t->key, t->keys, count, t->dim);
        widen(t->value, t->values, count, t->dim);
    }
    products(t, count, t->scores);
    tile_softmax(t, count);
    add_values(t, count);
}

// One more key. bias [ROWS]: 0 or -inf for each row, or NULL where every row sees it.
INLINE void tile_key(Tile *t, const char *key, const char *value, const float *bias) {
    t->key[t->count] = key, t->value[t->count] = value, t->bias[t->count] = bias;
    if (++t->count == KEYS) tile_flush(t);
}
