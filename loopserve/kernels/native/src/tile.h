// Compute attention of one tile of rows over any list of keys: products, online softmax, weighted values.
//
// Vector lanes hold rows: scores are S[key][row], the output is O[d][row]. So keys and values are read in place, in any order and
// with any gaps. The running maximum and sum of a row stay in its lane. A mask that depends on row minus key is a contiguous load.
#pragma once
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vec.h"

#define ROWS 64               // rows of a tile
#define ROW_VECTORS (ROWS / VW)
#define SLICE 4               // vectors of rows per inner kernel
#define KEYS 64               // keys per block, so that its scores stay in cache
#define WIDE (VW == 8 ? 2 : 4)  // keys or channels per inner kernel, limited by registers for sums
#define KEY_STEP 8            // blocks are padded to a multiple of this

#define LARGE ((size_t)2 << 20)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

typedef struct {
    int64_t dim;      // channels of queries, keys and values
    int half;         // the numbers are bfloat16
    int vectors;      // of rows in use, 1 to ROW_VECTORS
    int pairs;        // bfloat16, and the processor multiplies pairs
    float scale;      // of scores, times log2(e), since the softmax uses powers of 2
    void *queries;    // packed: float [dim][ROWS], or pairs [dim / 2][ROWS]
    float *scores;    // [KEYS][ROWS]
    uint32_t *weights;  // pairs of bfloat16 [KEYS / 2][ROWS]
    void *values;     // pairs [KEYS / 2][dim], or float [KEYS][dim] converted from half
    float *keys;      // float [KEYS][dim] converted from half
    float *output;    // [dim][ROWS]
    float *most, *sum;  // [ROWS]: running maximum of the scores, running sum of their powers
    int count;        // keys buffered in the block
    const char *key[KEYS], *value[KEYS];
    const float *bias[KEYS];  // added to the scores of a row (0 or -inf), or NULL
    unsigned control;  // what the thread's floating-point control register was before, 0 if it was not changed
} Tile;

static const float nothing[ROWS] __attribute__((unused)) = {
#define N4 -INFINITY, -INFINITY, -INFINITY, -INFINITY
#define N16 N4, N4, N4, N4
    N16, N16, N16, N16};

// Allocate a buffer. Large ones request huge pages, since a page fault per 4 KiB takes longer than filling it.
static inline __attribute__((unused)) void *allocate(size_t bytes) {
    size_t step = bytes >= LARGE ? LARGE : 64;
    void *found = aligned_alloc(step, (bytes + step - 1) / step * step + (step == 64 ? 64 : 0));
#if defined(__linux__)
    if (found && bytes >= LARGE) madvise(found, (bytes + step - 1) / step * step, MADV_HUGEPAGE);
#endif
    return found;
}

// Open a tile and, until it is closed, let this thread round subnormal results to 0: a processor needs some hundred cycles for each,
// and weights that small change no sum.
static __attribute__((unused)) int tile_open(Tile *t, int64_t dim, int half, float scale) {
    t->control = 0;
#if defined(__x86_64__)
    t->control = _mm_getcsr();
    _mm_setcsr(t->control | _MM_FLUSH_ZERO_ON);
#endif
    t->dim = dim, t->half = half, t->scale = scale * LOG2E;
    t->pairs = half && LS_BF16;
    t->queries = allocate(dim * ROWS * 4), t->scores = allocate(KEYS * ROWS * 4), t->weights = allocate(KEYS / 2 * ROWS * 4);
    t->values = allocate(KEYS * dim * 4), t->keys = allocate(KEYS * dim * 4), t->output = allocate(dim * ROWS * 4);
    t->most = allocate(ROWS * 4), t->sum = allocate(ROWS * 4);
    return t->queries && t->scores && t->weights && t->values && t->keys && t->output && t->most && t->sum;
}

static __attribute__((unused)) void tile_close(Tile *t) {
    free(t->queries), free(t->scores), free(t->weights), free(t->values), free(t->keys), free(t->output);
    free(t->most), free(t->sum);
#if defined(__x86_64__)
    if (t->control) _mm_setcsr(t->control);
#endif
}

// Load rows [rows][dim] at a stride in numbers as the queries of the tile. Lanes without a row are zero.
static __attribute__((unused)) void tile_queries(Tile *t, const char *rows, int64_t count, int64_t stride) {
    int64_t dim = t->dim, words = t->pairs ? dim / 2 : dim;  // a word is a number or a pair
    int64_t step = stride * (t->half ? 2 : 4);
    t->vectors = (count + VW - 1) / VW;
    float *packed = t->queries;
    for (int64_t r = 0; r < t->vectors * VW; r += VW)
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
}

// Begin a tile of attention.
static __attribute__((unused)) void tile_begin(Tile *t, const char *rows, int64_t count, int64_t stride) {
    tile_queries(t, rows, count, stride);
    memset(t->output, 0, t->dim * ROWS * 4);
    for (int r = 0; r < ROWS; r++) t->most[r] = -INFINITY, t->sum[r] = 0;
    t->count = 0;
}

// Compute scores of `vectors` vectors of rows from `part` on with `wide` keys from `j` on. Both are constants where this is inlined.
INLINE void products_of(const Tile *t, float *scores, int j, int part, int vectors, int wide) {
    const float *queries = (const float *)t->queries + part * VW;
    const char *const *key = t->key + j;
    vf sums[8][SLICE];
    UNROLL for (int i = 0; i < wide; i++) UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = (vf){};
    if (t->pairs) {
#if LS_BF16
        for (int64_t d = 0; d < t->dim / 2; d++) {
            __m512bh query[SLICE];
            UNROLL for (int v = 0; v < vectors; v++) query[v] = (__m512bh)load(queries + d * ROWS + v * VW);
            UNROLL for (int i = 0; i < wide; i++) {
                int32_t pair;
                memcpy(&pair, key[i] + 4 * d, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                UNROLL for (int v = 0; v < vectors; v++)
                    sums[i][v] = (vf)_mm512_dpbf16_ps((__m512)sums[i][v], query[v], both);
            }
        }
#endif
    } else {
        for (int64_t d = 0; d < t->dim; d++) {
            vf query[SLICE];
            UNROLL for (int v = 0; v < vectors; v++) query[v] = load(queries + d * ROWS + v * VW);
            UNROLL for (int i = 0; i < wide; i++) {
                vf one = splat(((const float *)key[i])[d]);
                UNROLL for (int v = 0; v < vectors; v++) sums[i][v] += query[v] * one;
            }
        }
    }
    float *to = scores + j * ROWS + part * VW;
    UNROLL for (int i = 0; i < wide; i++) UNROLL for (int v = 0; v < vectors; v++) store(to + i * ROWS + v * VW, sums[i][v]);
}

// Compute unscaled scores [count][ROWS] of the keys of the block; count is a multiple of KEY_STEP.
static __attribute__((unused)) void products(const Tile *t, int count, float *scores) {
    int part = 0;
    for (; t->vectors - part >= 3; part += SLICE)
        for (int j = 0; j < count; j += WIDE) products_of(t, scores, j, part, SLICE, WIDE);
    if (t->vectors - part == 2)
        for (int j = 0; j < count; j += 4) products_of(t, scores, j, part, 2, 4);
    if (t->vectors - part == 1)
        for (int j = 0; j < count; j += 8) products_of(t, scores, j, part, 1, 8);
}

// Add the weighted values of the keys of the block to the output. As in all running sums, a block is summed separately: adding many
// small numbers one by one to a large one loses most of each.
INLINE void add_values_of(Tile *t, int count, int64_t d, int part, int vectors, int wide) {
    vf sums[8][SLICE];
    float *output = t->output + d * ROWS + part * VW;
    UNROLL for (int i = 0; i < wide; i++) UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = (vf){};
    if (t->pairs) {
#if LS_BF16
        const uint32_t *values = (const uint32_t *)t->values + d;
        const float *weights = (const float *)t->weights + part * VW;
        for (int k = 0; k < count / 2; k++) {
            __m512bh weight[SLICE];
            UNROLL for (int v = 0; v < vectors; v++) weight[v] = (__m512bh)load(weights + k * ROWS + v * VW);
            UNROLL for (int i = 0; i < wide; i++) {
                __m512bh both = (__m512bh)_mm512_set1_epi32((int)values[k * t->dim + i]);
                UNROLL for (int v = 0; v < vectors; v++)
                    sums[i][v] = (vf)_mm512_dpbf16_ps((__m512)sums[i][v], weight[v], both);
            }
        }
#endif
    } else {
        for (int k = 0; k < count; k++) {
            const float *value = (const float *)t->value[k] + d, *weights = t->scores + k * ROWS + part * VW;
            vf weight[SLICE];
            UNROLL for (int v = 0; v < vectors; v++) weight[v] = load(weights + v * VW);
            UNROLL for (int i = 0; i < wide; i++) {
                vf one = splat(value[i]);
                UNROLL for (int v = 0; v < vectors; v++) sums[i][v] += weight[v] * one;
            }
        }
    }
    UNROLL for (int i = 0; i < wide; i++) UNROLL for (int v = 0; v < vectors; v++) {
        float *at = output + i * ROWS + v * VW;
        store(at, load(at) + sums[i][v]);
    }
}

static __attribute__((unused)) void add_values(Tile *t, int count) {
    int part = 0;
    for (; t->vectors - part >= 3; part += SLICE)
        for (int64_t d = 0; d < t->dim; d += WIDE) add_values_of(t, count, d, part, SLICE, WIDE);
    if (t->vectors - part == 2)
        for (int64_t d = 0; d < t->dim; d += 4) add_values_of(t, count, d, part, 2, 4);
    if (t->vectors - part == 1)
        for (int64_t d = 0; d < t->dim; d += 8) add_values_of(t, count, d, part, 1, 8);
}

#if LS_BF16
// Interleave the values of two keys by channel: [count / 2][dim].
static __attribute__((unused)) void pair_values(Tile *t, int count) {
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

static __attribute__((unused)) void pair_weights(Tile *t, int count) {
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

// Convert rows of bfloat16 to float, for processors that do not multiply them.
static __attribute__((unused)) void widen(const char **from, float *to, int count, int64_t dim) {
    for (int k = 0; k < count; k++) {
        for (int64_t d = 0; d < dim; d += VW) store(to + k * dim + d, load_bf16((const bf16 *)from[k] + d));
        from[k] = (const char *)(to + k * dim);
    }
}

// Turn scores into weights, update the running maximum and sum of each row, and rescale the output.
static __attribute__((unused)) void tile_softmax(Tile *t, int count) {
    for (int part = 0; part < t->vectors; part += SLICE) {  // several vectors at once to hide latency
        float *scores = t->scores + part * VW;
        vf before[SLICE], most[SLICE], sum[SLICE], base[SLICE];
        UNROLL for (int v = 0; v < SLICE; v++) {
            before[v] = most[v] = load(t->most + (part + v) * VW);
            sum[v] = (vf){};
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
                store(t->sum + (part + v) * VW, load(t->sum + (part + v) * VW) * shrink);
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
        UNROLL for (int v = 0; v < SLICE; v++) store(t->sum + (part + v) * VW, load(t->sum + (part + v) * VW) + sum[v]);
    }
}

// Attend to the keys buffered in the block.
static __attribute__((unused)) void tile_flush(Tile *t) {
    int count = t->count;
    if (!count) return;
    while (count % KEY_STEP) {  // pad with a repeated key that no row sees
        t->key[count] = t->key[count - 1], t->value[count] = t->value[count - 1], t->bias[count] = nothing;
        count++;
    }
    t->count = 0;
    if (t->half && !t->pairs) {
        widen(t->key, t->keys, count, t->dim);
        widen(t->value, t->values, count, t->dim);
    }
    products(t, count, t->scores);
    tile_softmax(t, count);
#if LS_BF16
    if (t->pairs) pair_weights(t, count), pair_values(t, count);
#endif
    add_values(t, count);
}

// Add a key. bias [ROWS]: 0 or -inf for each row, or NULL where every row sees the key.
INLINE void tile_key(Tile *t, const char *key, const char *value, const float *bias) {
    t->key[t->count] = key, t->value[t->count] = value, t->bias[t->count] = bias;
    if (++t->count == KEYS) tile_flush(t);
}
