// Attention of a few queries over an active set, a copy of its own or chosen columns of the store in place: keys are read once for
// all query heads of a group; long sets are split over threads and the parts joined by their sums.
#include "attention.h"
#include "cells.h"
#include "common.h"

#define CHUNK 256  // keys at once: they stay in the second-level cache for the next query of the group
#define AHEAD 64   // keys that are asked for before their turn, where they stand in no order

// What a row has seen so far.
typedef struct {
    float most, sum;
} State;

// Ask for a row early. Into the second-level cache, which has many more requests under way than the first.
INLINE void ask_for(const char *row, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

// columns [known]: where the pairs of this chunk stand, `count` of them, and then those of the next. scattered: in no order, and not
// asked for yet; the first AHEAD keys are.
static void attend_chunk(const Attention *a, const char *query, const char *keys, const char *values, const int64_t *columns,
                         int64_t count, int64_t known, int scattered, State *state, float *output) {
    int64_t size = a->half ? 2 : 4;
    float scores[CHUNK] __attribute__((aligned(64)));
    const char *value[CHUNK], *row[VW];
    for (int i = 0; i < VW; i++) row[i] = query;
    vf most = splat(state->most);
    for (int64_t i = 0; i < count; i += VW) {
        const char *key[VW];
        if (scattered)  // the values for the sum below, and the keys of the steps to come
            for (int64_t j = i; j < i + VW && j < count; j++) {
                ask_for(values + columns[j] * a->value_row * size, a->dim * size);
                if (j + AHEAD < known) ask_for(keys + columns[j + AHEAD] * a->key_row * size, a->dim * size);
            }
        for (int j = 0; j < VW; j++) key[j] = keys + columns[i + j < count ? i + j : count - 1] * a->key_row * size;
        vf score = row_products(row, key, a->dim, a->half) * (a->scaling * LOG2E);
        store(scores + i, score);
        most = vmax(most, score);  // a key repeated to fill the vector changes no maximum
    }
    float base = most[0];
    for (int l = 1; l < VW; l++) base = most[l] > base ? most[l] : base;
    if (base > state->most) {
        float shrink = state->sum > 0 ? exp2f(state->most - base) : 0;
        for (int64_t d = 0; d < a->dim; d += VW) store(output + d, load(output + d) * shrink);
        state->sum *= shrink, state->most = base;
    }
    for (int64_t i = count; i % VW; i++) scores[i] = -INFINITY;
    vf sums = {};
    for (int64_t i = 0; i < count; i += VW) {
        vf weight = exp2v(load(scores + i) - base);
        sums += weight;
        store(scores + i, weight);
    }
    state->sum += sum_of(sums);
    for (int64_t i = 0; i < count; i++) value[i] = values + columns[i] * a->value_row * size;
    add_row(output, scores, value, count, a->dim, a->half);
}

// Returns 0, or 1 if memory ran out.
int LS(decode_attention)(const Attention *a) {
    int64_t kv_heads = a->heads / a->group, size = a->half ? 2 : 4, lines = a->group * a->rows;  // lines: rows of a KV head
    int64_t sparse = a->chosen >= 0, chosen = sparse ? a->chosen : 0, tail = sparse ? a->tail : 0, pairs = chosen + a->total - tail;
    int64_t chunks = (pairs + CHUNK - 1) / CHUNK, splits = (4 * a->threads + kv_heads - 1) / kv_heads;
    if (splits > chunks) splits = chunks;
    if (a->threads == 1) splits = 1;
    int64_t per_split = (chunks + splits - 1) / splits * CHUNK, items = kv_heads * splits;
    State *states = room(items * lines * sizeof(State));
    float *outputs = room(items * lines * a->dim * 4);
    if (!states || !outputs) { free(states), free(outputs); return 1; }
    memset(outputs, 0, items * lines * a->dim * 4);
#pragma omp parallel for num_threads(a->threads) schedule(dynamic, 1) if (a->threads > 1)
    for (int64_t item = 0; item < items; item++) {
        int64_t kv = item / splits, split = item % splits, start = a->first_valid ? a->first_valid[kv] : 0;
        int64_t from = split * per_split, to = from + per_split < pairs ? from + per_split : pairs;
        const char *keys = a->keys + kv * a->key_head * size, *values = a->values + kv * a->value_head * size;
        State *state = states + item * lines;
        float *output = outputs + item * lines * a->dim;
        for (int64_t line = 0; line < lines; line++) state[line] = (State){-INFINITY, 0};
        const int64_t *own = a->columns + kv * chosen;
        if (sparse)
            while (from < chosen && own[from] < 0) from++;
        else if (from < start) from = start;
        for (int64_t at = from; at < to; at += CHUNK) {
            int64_t columns[CHUNK + AHEAD], last = at + CHUNK < to ? at + CHUNK : to, known = last + AHEAD < to ? last + AHEAD : to;
            for (int64_t i = at; i < known; i++)  // filler in the midst, where none belongs, must not be read before the buffer
                columns[i - at] = i >= chosen ? tail + i - chosen : own[i] < 0 ? 0 : own[i];
            for (int64_t i = at; sparse && at == from && i < known && i < at + AHEAD; i++)
                ask_for(keys + columns[i - at] * a->key_row * size, a->dim * size);
            for (int64_t line = 0; line < lines; line++) {
                int64_t head = kv * a->group + line / a->rows, row = line % a->rows;
                int64_t seen = pairs - a->rows + row + 1, end = last < seen ? last : seen;
                if (at < end)
                    attend_chunk(a, a->queries + (head * a->query_head + row * a->query_row) * size, keys, values, columns, end - at,
                                 known - at, sparse && line == 0, state + line, output + line * a->dim);
            }
        }
    }
    for (int64_t place = 0; place < a->heads * a->rows; place++) {  // join the splits
        int64_t head = place / a->rows, kv = head / a->group, line = (head % a->group) * a->rows + place % a->rows;
        float most = -INFINITY, sum = 0, *joined = outputs + (kv * splits * lines + line) * a->dim;
        for (int64_t s = 0; s < splits; s++) most = fmaxf(most, states[(kv * splits + s) * lines + line].most);
        for (int64_t s = 0; s < splits; s++) {
            State part = states[(kv * splits + s) * lines + line];
            const float *output = outputs + ((kv * splits + s) * lines + line) * a->dim;
            float share = part.sum > 0 ? exp2f(part.most - most) : 0;
            sum += part.sum * share;
            for (int64_t d = 0; d < a->dim; d += VW)
                store(joined + d, load(output + d) * share + (s ? load(joined + d) : (vf){}));
        }
        float inverse = sum > 0 ? 1 / sum : 0;
        a->lse[place] = sum > 0 ? LN2 * (most + log2f(sum)) : -INFINITY;
        for (int64_t d = 0; d < a->dim; d += VW) {
            vf x = load(joined + d) * inverse;
            if (a->half) store_bf16((bf16 *)a->output + place * a->dim + d, x);
            else store((float *)a->output + place * a->dim + d, x);
        }
    }
    free(states), free(outputs);
    return 0;
}
