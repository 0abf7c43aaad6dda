// Compute attention on the exact union of vertical and slash lines, which differ per head. With every slash it is dense attention.
//
// Adjacent slashes form bands that are computed in tiles. An isolated slash is computed cell by cell. Both leave out keys on
// verticals, to which all rows of a tile attend together. So each cell is computed once.
#include "attention.h"
#include "cells.h"
#include "common.h"
#include "tile.h"

typedef struct {
    int32_t from, to;  // offsets from <= d < to
    int32_t whole;     // every offset is chosen
} Band;

// Lines of one head, prepared for the tiles.
typedef struct {
    int32_t *verticals, *lonely;
    Band *bands;
    int64_t vertical_count, lonely_count, band_count;
    uint8_t *on_vertical;   // [total]
    float *key_bias;        // [ROWS + total + ROWS]: -inf for a key on a vertical or outside the store
    float *offset_bias;     // [ROWS + total + ROWS]: 0 for an offset in a band, -inf for any other
    int64_t start;          // first column that holds a pair
    double per_row;         // estimated cost of a row, in keys
} Lines;

// Measured cost of a cell of an isolated slash, in cells of a tile. It includes scattered reads and sums over channels.
#define LONELY_FLOAT 5.0
#define LONELY_HALF 3.5
#define CHUNK 64  // isolated slashes per step

static void lines_close(Lines *l) {
    free(l->verticals), free(l->lonely), free(l->bands), free(l->on_vertical), free(l->key_bias), free(l->offset_bias);
}

static int lines_open(Lines *l, const Attention *a, int64_t head) {
    int64_t total = a->total;
    const uint8_t *slashes = a->slashes + head * total, *verticals = a->verticals + head * total;
    double lonely_cost = a->half && LS_BF16 ? LONELY_HALF : LONELY_FLOAT;
    *l = (Lines){.start = a->first_valid ? a->first_valid[head / a->group] : 0};
    int64_t chosen = 0, found = 0;
    for (int64_t x = 0; x < total; x++) chosen += slashes[x], found += verticals[x];
    l->verticals = allocate(found * 4), l->lonely = allocate(chosen * 4), l->bands = allocate(chosen * sizeof(Band));
    l->on_vertical = allocate(total), l->key_bias = allocate((total + 2 * ROWS) * 4), l->offset_bias = allocate((total + 2 * ROWS) * 4);
    if (!l->verticals || !l->lonely || !l->bands || !l->on_vertical || !l->key_bias || !l->offset_bias) return 0;
    memcpy(l->on_vertical, verticals, total);
    for (int64_t x = 0; x < total + 2 * ROWS; x++) l->key_bias[x] = l->offset_bias[x] = -INFINITY;
    for (int64_t j = l->start; j < total; j++) {
        if (verticals[j]) l->verticals[l->vertical_count++] = j;
        else l->key_bias[ROWS + j] = 0;
    }
    int64_t d = 0;
    while (d < total) {
        if (!slashes[d]) { d++; continue; }
        int64_t from = d, to = d + 1, count = 1;
        for (int64_t x = to; x < total && x < to + ROWS / 4; x++)
            if (slashes[x]) to = x + 1, count++;
        if (to - from + ROWS - 1 <= lonely_cost * count) {
            l->bands[l->band_count++] = (Band){from, to, count == to - from};
            for (int64_t x = from; x < to; x++)
                if (slashes[x]) l->offset_bias[ROWS + x] = 0;
            l->per_row += to - from + ROWS - 1;
        } else {
            for (int64_t x = from; x < to; x++)
                if (slashes[x]) l->lonely[l->lonely_count++] = x;
        }
        d = to;
    }
    l->per_row += l->vertical_count + lonely_cost * l->lonely_count;
    return 1;
}

// Buffers of a thread for isolated slashes.
typedef struct {
    float *scores;   // [CHUNK][ROWS]
    float *output;   // [ROWS][dim]
    float most[ROWS], sum[ROWS];
} Lonely;

static void attend_lonely(const Attention *a, const Lines *l, const Tile *t, Lonely *own, const char *queries,
                          const char *keys, const char *values, int64_t column, int64_t rows) {
    int64_t size = a->half ? 2 : 4, dim = a->dim;
    memset(own->output, 0, ROWS * dim * 4);
    for (int r = 0; r < ROWS; r++) own->most[r] = -INFINITY, own->sum[r] = 0;
    for (int64_t at = 0; at < l->lonely_count; at += CHUNK) {
        int64_t offsets[CHUNK], count = 0;
        for (int64_t i = at; i < l->lonely_count && i < at + CHUNK; i++)
            if (column + rows - 1 - l->lonely[i] >= l->start) offsets[count++] = l->lonely[i];
        if (!count) return;  // offsets ascend, so all others are before the start too
        for (int v = 0; v < ROW_VECTORS && v * VW < rows; v++) {
            const char *row[VW], *key[VW];
            for (int r = 0; r < VW; r++) row[r] = queries + (v * VW + r < rows ? v * VW + r : rows - 1) * a->query_row * size;
            vf before = load(own->most + v * VW), most = before;
            for (int64_t i = 0; i < count; i++) {
                int64_t first = column + v * VW - offsets[i];
                if (first >= 0 && first + VW <= a->total)
                    UNROLL for (int r = 0; r < VW; r++) key[r] = keys + (first + r) * a->key_row * size;
                else
                    for (int r = 0; r < VW; r++) {
                        int64_t k = first + r < 0 ? 0 : first + r < a->total ? first + r : a->total - 1;
                        key[r] = keys + k * a->key_row * size;
                    }
                vf score = row_products(row, key, dim, a->half) * t->scale;
                score = first <= -ROWS ? splat(-INFINITY) : score + load(l->key_bias + ROWS + first);
                score = where(score == score, score, splat(-INFINITY));  // a filler column may hold NaN
                store(own->scores + i * ROWS + v * VW, score);
                most = vmax(most, score);
            }
            vf base = where(most == -INFINITY, (vf){}, most), shrink = exp2v(before - base);
            vf sum = {};
            for (int64_t i = 0; i < count; i++) {
                vf weight = exp2v(load(own->scores + i * ROWS + v * VW) - base);
                sum += weight;
                store(own->scores + i * ROWS + v * VW, weight);
            }
            store(own->most + v * VW, most), store(own->sum + v * VW, load(own->sum + v * VW) * shrink + sum);
            if (at)
                for (int r = 0; r < VW; r++)
                    for (int64_t d = 0; d < dim; d += VW) {
                        float *place = own->output + (v * VW + r) * dim + d;
                        store(place, load(place) * shrink[r]);
                    }
        }
        for (int64_t r = 0; r < rows; r++) {
            const char *value[CHUNK];
            int64_t used = 0;
            float weights[CHUNK];
            for (int64_t i = 0; i < count; i++) {
                float weight = own->scores[i * ROWS + r];
                if (weight > 0) weights[used] = weight, value[used++] = values + (column + r - offsets[i]) * a->value_row * size;
            }
            add_row(own->output + r * dim, weights, value, used, dim, a->half);
        }
    }
}

static void attend_bands(const Attention *a, const Lines *l, Tile *t, const char *keys, const char *values, int64_t column) {
    int64_t key_step = a->key_row * (a->half ? 2 : 4), value_step = a->value_row * (a->half ? 2 : 4);
    int64_t done = column + ROWS;  // each band reaches further back and skips keys that the last one covered
    for (int64_t b = 0; b < l->band_count; b++) {
        Band band = l->bands[b];
        int64_t from = column - band.to + 1, to = column + ROWS - band.from;
        if (from < l->start) from = l->start;
        if (to > done) to = done;
        if (to > a->total) to = a->total;
        for (int64_t k = from; k < to; k++) {
            if (l->on_vertical[k]) continue;
            int64_t offset = column - k;  // of the first row
            int inside = band.whole && offset >= band.from && offset + ROWS <= band.to;
            tile_key(t, keys + k * key_step, values + k * value_step, inside ? NULL : l->offset_bias + ROWS + offset);
        }
        if (from < done) done = from;
    }
}

static void attend_dense(const Attention *a, Tile *t, const char *keys, const char *values, int64_t column, int64_t rows,
                         int64_t start, const float *causal, const float *windowed) {
    int64_t key_step = a->key_row * (a->half ? 2 : 4), value_step = a->value_row * (a->half ? 2 : 4);
    int64_t from = column - a->window + 1;
    if (from < start) from = start;
    for (int64_t k = from; k < column + rows; k++) {
        const float *bias = NULL;
        if (k > column) bias = causal + ROWS + column - k;
        if (column + rows - k > a->window) bias = windowed + ROWS + column - k - a->window;
        tile_key(t, keys + k * key_step, values + k * value_step, bias);
    }
}

// Write the rows of a tile: divide by the sums and merge the part of the isolated slashes.
static void finish(const Attention *a, const Tile *t, const Lonely *own, int lonely, int64_t head, int64_t first, int64_t rows) {
    float scale[ROWS], own_scale[ROWS];
    for (int64_t r = 0; r < rows; r++) {
        float most = t->most[r], sum = t->sum[r];
        scale[r] = 1, own_scale[r] = 0;
        if (lonely && own->sum[r] > 0) {
            float base = own->most[r] > most ? own->most[r] : most;
            scale[r] = exp2f(most - base), own_scale[r] = exp2f(own->most[r] - base);
            sum = sum * scale[r] + own->sum[r] * own_scale[r], most = base;
        }
        scale[r] = sum > 0 ? scale[r] / sum : 0, own_scale[r] = sum > 0 ? own_scale[r] / sum : 0;
        a->lse[head * a->rows + first + r] = sum > 0 ? LN2 * (most + log2f(sum)) : -INFINITY;
    }
    for (int64_t r = 0; r < rows; r += VW)
        for (int64_t d = 0; d < a->dim; d += VW) {
            vf block[VW];
            for (int i = 0; i < VW; i++) block[i] = load(t->output + (d + i) * ROWS + r);
            transpose(block);
            for (int i = 0; i < VW && r + i < rows; i++) {
                vf x = block[i] * scale[r + i];
                if (own_scale[r + i] > 0) x += load(own->output + (r + i) * a->dim + d) * own_scale[r + i];
                int64_t place = (head * a->rows + first + r + i) * a->dim + d;
                if (a->half) store_bf16((bf16 *)a->output + place, x);
                else store((float *)a->output + place, x);
            }
        }
}

typedef struct { double cost; int32_t head, tile; } Work;

static int longest_first(const void *a, const void *b) {
    double x = ((const Work *)a)->cost, y = ((const Work *)b)->cost;
    return (x < y) - (x > y);
}

// Return 0, or 1 if memory ran out.
int LS(vertical_slash)(const Attention *a) {
    int64_t tiles = (a->rows + ROWS - 1) / ROWS, items = a->heads * tiles, size = a->half ? 2 : 4;
    int failed = 0, sparse = a->slashes != NULL;
    Lines *lines = calloc(a->heads, sizeof(Lines));
    Work *work = allocate(items * sizeof(Work));
    float causal[3 * ROWS], windowed[3 * ROWS];
    for (int r = 0; r < 3 * ROWS; r++) causal[r] = r < ROWS ? -INFINITY : 0, windowed[r] = r < ROWS ? 0 : -INFINITY;
    if (!lines || !work) { free(lines), free(work); return 1; }
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        if (sparse) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t head = 0; head < a->heads; head++)
                if (!lines_open(&lines[head], a, head)) failed = 1;
        }
#pragma omp single
        {
            for (int64_t i = 0; i < items; i++) {
                int32_t head = i / tiles, tile = i % tiles;
                double seen = a->total - a->rows + (tile + 1) * ROWS, per_row = sparse ? lines[head].per_row : a->window;
                work[i] = (Work){per_row < seen ? per_row : seen, head, tile};
            }
            qsort(work, items, sizeof(Work), longest_first);
        }
        Tile t;
        Lonely own = {allocate(CHUNK * ROWS * 4), allocate(ROWS * a->dim * 4)};
        if (!tile_open(&t, a->dim, a->half, a->scaling) || !own.scores || !own.output) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < items; i++) {
            if (failed) continue;
            int64_t head = work[i].head, first = work[i].tile * ROWS, rows = a->rows - first < ROWS ? a->rows - first : ROWS;
            int64_t column = a->total - a->rows + first, kv = head / a->group;
            const char *queries = a->queries + (head * a->query_head + first * a->query_row) * size;
            const char *keys = a->keys + kv * a->key_head * size, *values = a->values + kv * a->value_head * size;
            const Lines *l = &lines[head];
            tile_begin(&t, queries, rows, a->query_row);
            if (sparse) {
                if (l->lonely_count) attend_lonely(a, l, &t, &own, queries, keys, values, column, rows);
                attend_bands(a, l, &t, keys, values, column);
                for (int64_t v = 0; v < l->vertical_count && l->verticals[v] < column + rows; v++) {
                    int64_t k = l->verticals[v];
                    tile_key(&t, keys + k * a->key_row * size, values + k * a->value_row * size,
                             k > column ? causal + ROWS + column - k : NULL);
                }
            } else {
                attend_dense(a, &t, keys, values, column, rows, a->first_valid ? a->first_valid[kv] : 0, causal, windowed);
            }
            tile_flush(&t);
            finish(a, &t, &own, sparse && l->lonely_count, head, first, rows);
        }
        tile_close(&t);
        free(own.scores), free(own.output);
    }
    if (sparse)
        for (int64_t head = 0; head < a->heads; head++) lines_close(&lines[head]);
    free(lines), free(work);
    return failed;
}

// Compute attention on the key tiles selected per query tile. Return 0, or 1 if memory ran out.
int LS(block_sparse)(const Attention *a) {
    int64_t block = a->window, height = block < ROWS ? block : ROWS, steps = (block + height - 1) / height;
    int64_t block_rows = (a->rows + block - 1) / block, block_columns = (a->total + block - 1) / block;
    int64_t items = a->heads * block_rows * steps, size = a->half ? 2 : 4;
    int failed = 0;
    float causal[3 * ROWS];
    for (int r = 0; r < 3 * ROWS; r++) causal[r] = r < ROWS ? -INFINITY : 0;
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        Tile t;
        if (!tile_open(&t, a->dim, a->half, a->scaling)) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < items; i++) {
            int64_t step = i % steps, chosen_row = i / steps, head = chosen_row / block_rows, kv = head / a->group;
            int64_t first = chosen_row % block_rows * block + step * height, last = chosen_row % block_rows * block + block;
            if (last > a->rows) last = a->rows;
            int64_t rows = last - first < height ? last - first : height;
            if (failed || rows <= 0) continue;
            int64_t column = a->total - a->rows + first, start = a->first_valid ? a->first_valid[kv] : 0;
            const char *keys = a->keys + kv * a->key_head * size, *values = a->values + kv * a->value_head * size;
            const uint8_t *chosen = a->blocks + chosen_row * block_columns;
            tile_begin(&t, a->queries + (head * a->query_head + first * a->query_row) * size, rows, a->query_row);
            for (int64_t b = 0; b < block_columns && b * block < column + rows; b++) {
                int64_t from = b * block > start ? b * block : start, to = (b + 1) * block;
                if (to > column + rows) to = column + rows;
                for (int64_t k = from; chosen[b] && k < to; k++)
                    tile_key(&t, keys + k * a->key_row * size, values + k * a->value_row * size,
                             k > column ? causal + ROWS + column - k : NULL);
            }
            tile_flush(&t);
            finish(a, &t, NULL, 0, head, first, rows);
        }
        tile_close(&t);
    }
    return failed;
}
