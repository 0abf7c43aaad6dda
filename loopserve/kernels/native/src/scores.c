// Compute softmax rows with the masses of their lines, and scores of tokens.
#include "common.h"
#include "rows.h"

// Buffers of one thread.
typedef struct {
    Tile tile;
    float *rows;       // token scores: [ROWS][total]
    float *joined;     // token scores: [SPAN]
    float *backwards;  // line scores: [total]
} Buffers;

static int open_buffers(Buffers *r, const Scores *s, int tokens) {
    *r = (Buffers){0};
    if (!tile_open(&r->tile, s->dim, s->half, s->scaling)) return 0;
    if (tokens) r->rows = allocate(ROWS * s->total * 4), r->joined = allocate(SPAN * 4);
    else r->backwards = allocate(s->total * 4);
    return tokens ? r->rows && r->joined : r->backwards != NULL;
}

static void close_buffers(Buffers *r) {
    tile_close(&r->tile);
    free(r->rows), free(r->joined), free(r->backwards);
}

static void line_scores_of(Buffers *own, const Scores *s, int64_t head) {
    int64_t total = s->total;
    float *slash = s->slash + head * total;
    softmax_rows(&own->tile, s, head, s->probabilities + head * s->rows * total, total, s->vertical + head * total, own->backwards);
    for (int64_t d = 0; d < total; d++) slash[d] = own->backwards[total - 1 - d];
}

// Reduce the weights of one query head, rows [count][total] from column `from` on, and add them to the scores of its KV head.
static void add_head(const Tile *t, const float *rows, int64_t lane, int64_t count, const Scores *s, int64_t from, int64_t number,
                     float *joined, float *tokens) {
    float share = 1.0f / (s->group * (s->join == 0 ? s->rows : 1));
    memset(joined, 0, SPAN * 4);
    for (int64_t r = lane; r < lane + count; r++) {
        const float *row = rows + r * s->total + from;
        float base = base_of(t, r);
        int64_t k = 0;
        if (s->join == 2) {
            for (; k + VW <= number; k += VW) store(joined + k, vmax(load(joined + k), exp2v(load(row + k) - base)));
            for (; k < number; k++) joined[k] = fmaxf(joined[k], exp2f(row[k] - base));
        } else {
            for (; k + VW <= number; k += VW) store(joined + k, load(joined + k) + exp2v(load(row + k) - base));
            for (; k < number; k++) joined[k] += exp2f(row[k] - base);
        }
    }
    for (int64_t k = 0; k < number; k++) tokens[from + k] += joined[k] * share;
}

// With few rows per head, the heads of a group share a tile, so that the keys are read once for all.
static void token_scores_of(Buffers *own, const Scores *s, int64_t kv) {
    int64_t size = s->half ? 2 : 4, total = s->total, start = s->first_valid ? s->first_valid[kv] : 0;
    int64_t together = s->rows <= ROWS ? ROWS / s->rows : 1;  // heads per tile
    float *tokens = s->tokens + kv * total;
    memset(tokens, 0, total * 4);
    for (int64_t head = 0; head < s->group; head += together)
        for (int64_t first = 0; first < s->rows; first += ROWS) {
            int64_t heads = s->group - head < together ? s->group - head : together;
            int64_t count = s->rows - first < ROWS ? s->rows - first : ROWS, columns[ROWS], end = 0;
            for (int64_t r = 0; r < heads * count; r++) {
                columns[r] = s->columns[first + r % count];
                end = columns[r] + 1 > end ? columns[r] + 1 : end;
            }
            if (start >= end) continue;
            const char *queries = s->queries + ((kv * s->group + head) * s->rows + first) * s->dim * size;
            tile_queries(&own->tile, queries, heads * count, s->dim);
            row_scores(&own->tile, s, s->keys + kv * s->key_head * size, columns, heads * count, start, end, own->rows, total);
            for (int64_t from = start; from < end; from += SPAN)
                for (int64_t h = 0; h < heads; h++)
                    add_head(&own->tile, own->rows, h * count, count, s, from, from + SPAN < end ? SPAN : end - from, own->joined, tokens);
        }
}

// Each function returns 0, or 1 if memory ran out.
static int for_each(const Scores *s, int tokens) {
    int failed = 0;
    int64_t items = tokens ? s->heads / s->group : s->heads;
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
        Buffers own;
        if (!open_buffers(&own, s, tokens)) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < items; i++) {
            if (failed) continue;
            if (tokens) token_scores_of(&own, s, i);
            else line_scores_of(&own, s, i);
        }
        close_buffers(&own);
    }
    return failed;
}

int LS(line_scores)(const Scores *s) { return for_each(s, 0); }

int LS(token_scores)(const Scores *s) { return for_each(s, 1); }
