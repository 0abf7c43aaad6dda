// Compute the softmax of some rows over all keys in two passes over their scores. The first multiplies, tracks the maximum and sum of
// each row, and writes the scores. The second reads the scores row by row, turns them into weights and sums them. Keys are read once.
#pragma once
#include "tile.h"

typedef struct {
    const char *queries, *keys;
    const int64_t *columns;      // [rows]: columns of the queries
    const int64_t *first_valid;  // [heads / group], or NULL
    float *probabilities;        // line scores: [heads][rows][total]
    float *vertical, *slash;     // line scores: [heads][total]
    float *tokens;               // token scores: [heads / group][total]
    int64_t key_head, key_row;   // strides in numbers; queries are contiguous
    int64_t heads, group, rows, total, dim, half, join, threads;  // join: 0 mean, 1 sum, 2 maximum over a head's rows
    float scaling;
} Scores;

#define SPAN 1024  // keys per step of the second pass, so that sums of lines stay in the L1 cache

// Run the first pass for up to ROWS rows of one query head or group: scaled scores (base 2) of keys start <= k < end into
// rows[r * stride + k], -inf where a row does not see a key. Afterwards tile->most and tile->sum hold each row's figures.
static __attribute__((unused)) void row_scores(Tile *t, const Scores *s, const char *keys, const int64_t *columns, int64_t count, int64_t start,
                       int64_t end, float *rows, int64_t stride) {
    int64_t key_step = s->key_row * (s->half ? 2 : 4), least = end;
    float at[ROWS];
    for (int r = 0; r < ROWS; r++) {
        at[r] = r < count ? columns[r] : -1;  // columns are exact in float up to 2^24 tokens
        t->most[r] = -INFINITY, t->sum[r] = 0;
        if (r < count && columns[r] < least) least = columns[r];
    }
    for (int64_t k = start; k < end; k += KEYS) {
        int number = end - k < KEYS ? end - k : KEYS, padded = (number + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
        for (int i = 0; i < padded; i++) t->key[i] = keys + (i < number ? k + i : end - 1) * key_step;
        if (t->half && !t->pairs) widen(t->key, t->keys, padded, t->dim);
        products(t, padded, t->scores);
        for (int v = 0; v < t->vectors; v++) {
            float *scores = t->scores + v * VW;
            vf before = load(t->most + v * VW), most = before, column = load(at + v * VW);
            if (k + number - 1 <= least) {
                for (int i = 0; i < number; i++) {
                    vf score = load(scores + i * ROWS) * t->scale;
                    store(scores + i * ROWS, score);
                    most = vmax(most, score);
                }
            } else {
                for (int i = 0; i < number; i++) {
                    vf score = load(scores + i * ROWS) * t->scale;
                    score = where(column < (float)(k + i), splat(-INFINITY), score);
                    store(scores + i * ROWS, score);
                    most = vmax(most, score);
                }
            }
            vf base = where(most == -INFINITY, (vf){}, most), sum = {};
            for (int i = 0; i < number; i++) sum += exp2v(load(scores + i * ROWS) - base);
            store(t->most + v * VW, most), store(t->sum + v * VW, load(t->sum + v * VW) * exp2v(before - base) + sum);
            for (int i = 0; i < number; i += VW) {
                vf block[VW];
                UNROLL for (int j = 0; j < VW; j++) block[j] = load(scores + (i + j) * ROWS);
                transpose(block);
                for (int j = 0; j < VW && v * VW + j < count; j++) {
                    float *to = rows + (v * VW + j) * stride + k + i;
                    if (i + VW <= number) store(to, block[j]);
                    else memcpy(to, &block[j], (number - i) * 4);
                }
            }
        }
    }
}

// Factors that turn the scores of a row into weights: 2 to the (score - base) times 1. A NaN score makes all weights of its row NaN.
static __attribute__((unused)) float base_of(const Tile *t, int r) { return t->sum[r] == 0 ? 0 : t->most[r] + log2f(t->sum[r]); }

// Compute the softmax rows [rows][total] of one query head, `stride` numbers apart, and their masses by key column and by offset in
// reverse order: entry total - 1 - d holds offset d, so that a row is added in memory order.
static __attribute__((unused)) void softmax_rows(Tile *t, const Scores *s, int64_t head, float *probabilities, int64_t stride,
                                                 float *vertical, float *backwards) {
    int64_t size = s->half ? 2 : 4, total = s->total, kv = head / s->group;
    int64_t start = s->first_valid ? s->first_valid[kv] : 0;
    memset(vertical, 0, total * 4), memset(backwards, 0, total * 4);
    for (int64_t first = 0; first < s->rows; first += ROWS) {
        int64_t count = s->rows - first < ROWS ? s->rows - first : ROWS, end = 0;
        const int64_t *columns = s->columns + first;
        for (int64_t r = 0; r < count; r++) end = columns[r] + 1 > end ? columns[r] + 1 : end;
        float *rows = probabilities + first * stride;
        if (start >= end) {
            for (int64_t r = 0; r < count; r++) memset(rows + r * stride, 0, total * 4);
            continue;
        }
        tile_queries(t, s->queries + (head * s->rows + first) * s->dim * size, count, s->dim);
        row_scores(t, s, s->keys + kv * s->key_head * size, columns, count, start, end, rows, stride);
        for (int64_t from = start; from < end; from += SPAN) {
            int64_t to = from + SPAN < end ? from + SPAN : end;
            for (int64_t r = 0; r < count; r++) {
                float base = base_of(t, r), *row = rows + r * stride, *diagonal = backwards + total - 1 - columns[r];
                int64_t seen = columns[r] + 1 < to ? columns[r] + 1 : to, k = from;
                for (; k + VW <= seen; k += VW) {
                    vf weight = exp2v(load(row + k) - base);
                    store(row + k, weight);
                    store(vertical + k, load(vertical + k) + weight);
                    store(diagonal + k, load(diagonal + k) + weight);
                }
                for (; k < seen; k++) {
                    float weight = exp2f(row[k] - base);
                    row[k] = weight, vertical[k] += weight, diagonal[k] += weight;
                }
                if (k < to) memset(row + k, 0, (to - k) * 4);
            }
        }
        for (int64_t r = 0; r < count; r++) {
            memset(rows + r * stride, 0, start * 4);
            memset(rows + r * stride + end, 0, (total - end) * 4);
        }
    }
}
