// Compute attention of a few queries over an active set: a separate copy, or chosen columns of the store in place. Keys are read once
// for all query heads of a group. Long sets are split over threads, and the parts are merged by their sums. One call serves many
// sessions. The split of a session depends on its own length and the number of threads only, and parts are merged in order. So the
// result does not depend on the other sessions, bit by bit.
#include "attention.h"
#include "cells.h"
#include "common.h"

#define CHUNK 256  // keys per step, so that they stay in the L2 cache for the next query of the group
#define AHEAD 64   // prefetch distance in keys, where their order is scattered

// Running softmax of a row.
typedef struct {
    float most, sum;
} State;

// Prefetch a row into the L2 cache, which supports many more outstanding requests than L1.
INLINE void ask_for(const char *row, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

// columns [known]: columns of the `count` pairs of this chunk, then those of the next. scattered: in no order, and only the first
// AHEAD keys are prefetched.
static void attend_chunk(const Attention *a, const char *query, const char *keys, const char *values, const int64_t *columns,
                         int64_t count, int64_t known, int scattered, State *state, float *output) {
    int64_t size = a->half ? 2 : 4;
    float scores[CHUNK] __attribute__((aligned(64)));
    const char *value[CHUNK], *row[VW];
    for (int i = 0; i < VW; i++) row[i] = query;
    vf most = splat(state->most);
    for (int64_t i = 0; i < count; i += VW) {
        const char *key[VW];
        if (scattered)  // the values for the sum below, and the keys of later steps
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

// Split of the work on one session: `splits` parts of `per_split` pairs per KV head. Each part is an item for a thread.
typedef struct {
    const Attention *a;
    int64_t kv_heads, lines, pairs, splits, per_split, first;  // lines: rows of a KV head; first: number of its first item
    State *states;   // [kv_heads][splits][lines]
    float *outputs;  // [kv_heads][splits][lines][dim]
    int *waiting;    // [kv_heads]: unfinished parts
} Plan;

static Plan plan_of(const Attention *a, int64_t threads) {
    int64_t kv_heads = a->heads / a->group, pairs = a->chosen >= 0 ? a->chosen + a->total - a->tail : a->total;
    int64_t chunks = (pairs + CHUNK - 1) / CHUNK, splits = (4 * threads + kv_heads - 1) / kv_heads;
    if (splits > chunks) splits = chunks;
    if (threads == 1) splits = 1;
    return (Plan){.a = a, .kv_heads = kv_heads, .lines = a->group * a->rows, .pairs = pairs, .splits = splits,
                  .per_split = (chunks + splits - 1) / splits * CHUNK};
}

static int by_size(const void *left, const void *right) {  // longest parts first, so that the last ones are short
    const Plan *x = left, *y = right;
    int64_t more = y->per_split * y->lines - x->per_split * x->lines;
    return more ? (more > 0 ? 1 : -1) : x->a < y->a ? -1 : x->a > y->a;
}

// Merge the parts of one KV head and write its rows.
static void join(const Plan *p, int64_t kv) {
    const Attention *a = p->a;
    for (int64_t line = 0; line < p->lines; line++) {
        int64_t place = kv * p->lines + line;  // rows of a group's heads are consecutive, as lines are
        const State *states = p->states + kv * p->splits * p->lines + line;
        float most = -INFINITY, sum = 0, *joined = p->outputs + (kv * p->splits * p->lines + line) * a->dim;
        for (int64_t s = 0; s < p->splits; s++) most = fmaxf(most, states[s * p->lines].most);
        for (int64_t s = 0; s < p->splits; s++) {
            State part = states[s * p->lines];
            const float *output = joined + s * p->lines * a->dim;
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
}

// Attend to one part of the keys of one KV head.
static void attend_part(const Plan *p, int64_t kv, int64_t split) {
    const Attention *a = p->a;
    int64_t size = a->half ? 2 : 4, sparse = a->chosen >= 0, chosen = sparse ? a->chosen : 0, tail = sparse ? a->tail : 0;
    int64_t start = a->first_valid ? a->first_valid[kv] : 0, pairs = p->pairs;
    int64_t from = split * p->per_split, to = from + p->per_split < pairs ? from + p->per_split : pairs;
    const char *keys = a->keys + kv * a->key_head * size, *values = a->values + kv * a->value_head * size;
    State *state = p->states + (kv * p->splits + split) * p->lines;
    float *output = p->outputs + (kv * p->splits + split) * p->lines * a->dim;
    for (int64_t line = 0; line < p->lines; line++) state[line] = (State){-INFINITY, 0};
    memset(output, 0, p->lines * a->dim * 4);
    const int64_t *own = sparse ? a->columns + kv * chosen : NULL;
    if (sparse)
        while (from < chosen && own[from] < 0) from++;
    else if (from < start) from = start;
    for (int64_t at = from; at < to; at += CHUNK) {
        int64_t columns[CHUNK + AHEAD], last = at + CHUNK < to ? at + CHUNK : to, known = last + AHEAD < to ? last + AHEAD : to;
        for (int64_t i = at; i < known; i++)  // misplaced filler (-1) must not read before the buffer
            columns[i - at] = i >= chosen ? tail + i - chosen : own[i] < 0 ? 0 : own[i];
        for (int64_t i = at; sparse && at == from && i < known && i < at + AHEAD; i++)
            ask_for(keys + columns[i - at] * a->key_row * size, a->dim * size);
        for (int64_t line = 0; line < p->lines; line++) {
            int64_t head = kv * a->group + line / a->rows, row = line % a->rows;
            int64_t seen = pairs - a->rows + row + 1, end = last < seen ? last : seen;
            if (at < end)
                attend_chunk(a, a->queries + (head * a->query_head + row * a->query_row) * size, keys, values, columns, end - at,
                             known - at, sparse && line == 0, state + line, output + line * a->dim);
        }
    }
}

// Attend for `number` sessions. Return 0, or 1 if memory ran out.
int LS(decode_attention_batch)(const Attention *requests, int64_t number) {
    int64_t threads = requests[0].threads, items = 0, heads = 0, states = 0, outputs = 0;
    Plan *plans = allocate(number * sizeof(Plan));
    if (!plans) return 1;
    for (int64_t i = 0; i < number; i++) plans[i] = plan_of(requests + i, threads);
    if (number > 1 && threads > 1) qsort(plans, number, sizeof(Plan), by_size);
    for (int64_t i = 0; i < number; i++) {
        Plan *p = plans + i;
        p->first = items;
        items += p->kv_heads * p->splits, heads += p->kv_heads;
        states += p->kv_heads * p->splits * p->lines, outputs += p->kv_heads * p->splits * p->lines * p->a->dim;
    }
    // One allocation for all sessions: outputs, whose sizes are multiples of a vector, states, counts.
    char *scratch = allocate(outputs * 4 + states * sizeof(State) + heads * sizeof(int));
    if (!scratch) { free(plans); return 1; }
    float *output = (float *)scratch;
    State *state = (State *)(scratch + outputs * 4);
    int *waiting = (int *)(state + states);
    for (int64_t i = 0; i < number; i++) {
        Plan *p = plans + i;
        p->outputs = output, p->states = state, p->waiting = waiting;
        output += p->kv_heads * p->splits * p->lines * p->a->dim, state += p->kv_heads * p->splits * p->lines;
        waiting += p->kv_heads;
        for (int64_t kv = 0; kv < p->kv_heads; kv++) p->waiting[kv] = p->splits;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t item = 0; item < items; item++) {
        int64_t low = 0, high = number;  // plans[low] is the last whose first item is at most this one
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            if (plans[middle].first <= item) low = middle;
            else high = middle;
        }
        const Plan *p = plans + low;
        int64_t kv = (item - p->first) / p->splits;
        attend_part(p, kv, (item - p->first) % p->splits);
        if (p->splits == 1 || !__atomic_sub_fetch(p->waiting + kv, 1, __ATOMIC_ACQ_REL)) join(p, kv);  // the last part to finish merges
    }
    free(plans), free(scratch);
    return 0;
}

// Returns 0, or 1 if memory ran out.
int LS(decode_attention)(const Attention *a) { return LS(decode_attention_batch)(a, 1); }
