// Code keys, compute logits of all keys from their codes, and choose the best columns.
//
// A code is a step between the smallest and the largest value of a channel in its page: key = low + code * step. So the logit of a
// key is the product of the query with `low`, computed once per page, plus the product of its codes with query * step. Where the
// processor multiplies bytes, query * step is rounded to 8-bit integers (16-bit for codes of more than 2 bits). The error of the
// codes is larger than that of this rounding.
#include <stdlib.h>

#include "best.h"
#include "code_pages.h"
#include "common.h"

enum { TOGETHER = 4 };  // queries of a group per pass: bounds are read and codes unpacked once for all of them

typedef struct {
    int64_t stride;   // columns, padded by a page and two vectors
    float *queries;   // [rows][dim] of the current head
    float *steps;     // [TOGETHER][dim]: query * step of the current page
    int8_t *bytes;    // [TOGETHER][2][dim]: the same in units of largest / 127, and the remainder in units of that / 127
    float scales[TOGETHER], offsets[TOGETHER];  // logit = products * scale + offset
    float *logits;    // [TOGETHER][stride]
    float *best;      // [stride]: maximum over the rows
    uint32_t *codes, *kept;  // [stride] each
    int32_t *places;  // [stride]
    int64_t *jumps;   // [budget]
} Desk;

static int64_t rows_of(const KeyCodes *k) { return k->group * k->tokens; }

static int desk_open(Desk *d, const KeyCodes *k) {
    int64_t stride = k->columns + k->page + 2 * VW, rows = rows_of(k) < TOGETHER ? rows_of(k) : TOGETHER;
    d->stride = stride, d->queries = allocate(rows_of(k) * k->dim * 4);
    d->steps = allocate(TOGETHER * k->dim * 4), d->bytes = allocate(TOGETHER * 2 * k->dim);
    d->logits = allocate(rows * stride * 4), d->best = allocate(stride * 4), d->codes = allocate(stride * 4), d->kept = allocate(stride * 4);
    d->places = allocate(stride * 4), d->jumps = allocate((k->budget + 1) * 8);
    return d->queries && d->steps && d->bytes && d->logits && d->best && d->codes && d->kept && d->places && d->jumps;
}

static void desk_close(Desk *d) {
    free(d->queries), free(d->steps), free(d->bytes), free(d->logits), free(d->best), free(d->codes), free(d->kept), free(d->places), free(d->jumps);
}

// Convert the queries of a head.
static void take_queries(const KeyCodes *k, Desk *d, int64_t head) {
    for (int64_t row = 0; row < rows_of(k); row++) {
        int64_t at = (head * k->group + row / k->tokens) * k->query_head + row % k->tokens * k->query_row;
        for (int64_t c = 0; c < k->dim; c += VW)
            store(d->queries + row * k->dim + c,
                  k->query_half ? load_bf16((const bf16 *)k->queries + at + c) : load((const float *)k->queries + at + c));
    }
}

#if defined(__AVX512VNNI__)
// Load bytes 16 piece to 16 piece + 15 of four keys of `width` bytes.
INLINE __m512i quarter_of(const uint8_t *keys, int64_t width, int64_t piece) {
    if (width == 16) return _mm512_loadu_si512(keys);
    if (width == 32) {
        __m512i a = _mm512_loadu_si512(keys), b = _mm512_loadu_si512(keys + 64);
        return piece ? _mm512_shuffle_i64x2(a, b, 0xdd) : _mm512_shuffle_i64x2(a, b, 0x88);
    }
    const uint8_t *from = keys + 16 * piece;
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(from + width)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(from + 2 * width)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(from + 3 * width)), 3);
}

// Multiply the codes of 16 keys with the integers of some rows. A lane holds a key, so nothing is summed across lanes. The products
// are shifted instead of the codes, once per position in a byte. width, bits and rows are constants where this is inlined.
INLINE void keys_by_bytes(const int8_t *bytes, int64_t dim, const uint8_t *keys, int64_t width, int bits, int rows, vf *found) {
    enum { MOST = 4 };
    int places = 8 / bits;
    __m512i sums[TOGETHER][MOST] = {}, rests[TOGETHER][MOST] = {};
    for (int64_t piece = 0; piece < width / 16; piece++) {
        __m512i a = quarter_of(keys, width, piece), b = quarter_of(keys + 4 * width, width, piece);
        __m512i c = quarter_of(keys + 8 * width, width, piece), d = quarter_of(keys + 12 * width, width, piece);
        __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        __m512i ba = _mm512_unpackhi_epi32(a, b), dc = _mm512_unpackhi_epi32(c, d);
        __m512i four[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(ba, dc),
                           _mm512_unpackhi_epi64(ba, dc)};  // [j]: bytes 4 j to 4 j + 3 of the piece, of keys 0, 4, 8, 12, 1, 5, ...
        UNROLL for (int j = 0; j < 4; j++) UNROLL for (int p = 0; p < places; p++) {
            __m512i codes = bits == 8 ? four[j] : _mm512_and_si512(four[j], _mm512_set1_epi8((char)(((1 << bits) - 1) << (bits * p))));
            const int8_t *step = bytes + p * width + 16 * piece + 4 * j;
            UNROLL for (int r = 0; r < rows; r++, step += 2 * dim) {
                int32_t of, rest;
                memcpy(&of, step, 4), memcpy(&rest, step + dim, 4);
                sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], codes, _mm512_set1_epi32(of));
                if (bits > 2) rests[r][p] = _mm512_dpbusd_epi32(rests[r][p], codes, _mm512_set1_epi32(rest));
            }
        }
    }
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 1; p < places; p++) {
            sums[r][0] = _mm512_add_epi32(sums[r][0], _mm512_srai_epi32(sums[r][p], bits * p));
            if (bits > 2) rests[r][0] = _mm512_add_epi32(rests[r][0], _mm512_srai_epi32(rests[r][p], bits * p));
        }
        found[r] = (vf)_mm512_cvtepi32_ps(sums[r][0]);
        if (bits > 2) found[r] += (vf)_mm512_cvtepi32_ps(rests[r][0]) * (1.0f / 254);
        found[r] = (vf)_mm512_permutexvar_ps(order, (__m512)found[r]);
    }
}

INLINE void page_by_bytes(const KeyCodes *k, const Desk *d, const uint8_t *codes, int64_t width, int bits, int rows,
                          float *const *logits, int64_t first) {
    uint8_t last[VW * width];  // padding for a page whose length is not a multiple of 16
    for (int64_t at = 0; at < k->page; at += VW) {
        const uint8_t *keys = codes + at * width;
        if (at + VW > k->page) {
            memset(last, 0, sizeof last);
            memcpy(last, keys, (k->page - at) * width);
            keys = last;
        }
        vf found[TOGETHER];
        keys_by_bytes(d->bytes, k->dim, keys, width, bits, rows, found);
        UNROLL for (int r = 0; r < rows; r++) store(logits[r] + first + at, found[r] * d->scales[r] + d->offsets[r]);
    }
}

// Dispatch to versions with constant rows, bits and common widths.
static void any_page_by_bytes(const KeyCodes *k, const Desk *d, const uint8_t *codes, int64_t width, int rows, float *const *logits,
                              int64_t first) {
#define WITH(width, bits)                                                           \
    switch (rows) {                                                                 \
        case 1: page_by_bytes(k, d, codes, width, bits, 1, logits, first); return;  \
        case 2: page_by_bytes(k, d, codes, width, bits, 2, logits, first); return;  \
        case 3: page_by_bytes(k, d, codes, width, bits, 3, logits, first); return;  \
        default: page_by_bytes(k, d, codes, width, bits, 4, logits, first); return; \
    }
    if (k->bits == 4) WITH(width, 4)
    if (k->bits == 8) WITH(width, 8)
    if (width == 16) WITH(16, 2)
    if (width == 32) WITH(32, 2)
    WITH(width, 2)
#undef WITH
}

// Round the numbers `steps` [dim], whose largest magnitude is `most`, to integers. Return the value of one unit.
INLINE float to_bytes(const float *steps, int64_t dim, int bits, vf most, int8_t *bytes) {
    float largest = _mm512_reduce_max_ps((__m512)most), inverse = largest > 0 ? 127 / largest : 1;
    for (int64_t c = 0; c < dim; c += VW) {
        vf step = load(steps + c) * inverse;
        __m512i whole = _mm512_cvtps_epi32((__m512)step);
        _mm_storeu_si128((__m128i *)(bytes + c), _mm512_cvtsepi32_epi8(whole));
        if (bits > 2) {
            __m512i rest = _mm512_cvtps_epi32((__m512)((step - (vf)_mm512_cvtepi32_ps(whole)) * 254.0f));
            _mm_storeu_si128((__m128i *)(bytes + dim + c), _mm512_cvtsepi32_epi8(rest));
        }
    }
    return largest > 0 ? largest * (1.0f / 127) : 1;
}
#endif

static void page_by_floats(const KeyCodes *k, const float *steps, const uint8_t *codes, int64_t width, float offset, float *logits) {
    int mask = (1 << k->bits) - 1;
    for (int64_t i = 0; i < k->page; i++) {
        vf sum = {};
        float rest = 0;
        for (int64_t c = 0; c < k->dim; c += width) {
            int64_t j = 0, shift = c / width * k->bits;
            for (; j + VW <= width; j += VW) {
                vi x = __builtin_convertvector(*(const vb_loose *)(codes + i * width + j), vi);
                sum += __builtin_convertvector(x >> (int)shift & mask, vf) * load(steps + c + j);
            }
            for (; j < width; j++) rest += (codes[i * width + j] >> shift & mask) * steps[c + j];
        }
        logits[i] = (sum_of(sum) + rest) * k->scaling + offset;
    }
}

// Combine `rows` adjacent queries with the bounds of a page.
static void prepare(const KeyCodes *k, Desk *d, int64_t head, int64_t page, const float *queries, int rows) {
    int64_t dim = k->dim, size = k->half ? 2 : 4, at = (head * k->bounds_head + page * dim) * size;
    float share = 1.0f / ((1 << k->bits) - 1);
    vf sums[TOGETHER] = {}, most[TOGETHER] = {};
    for (int64_t c = 0; c < dim; c += VW) {
        vf low = k->half ? load_bf16((const bf16 *)(k->low + at) + c) : load((const float *)(k->low + at) + c);
        vf high = k->half ? load_bf16((const bf16 *)(k->high + at) + c) : load((const float *)(k->high + at) + c);
        vf step = (high - low) * share;
        for (int r = 0; r < rows; r++) {
            vf query = load(queries + r * dim + c), own = step * query;
            sums[r] += low * query, most[r] = vmax(most[r], vmax(own, -own));
            store(d->steps + r * dim + c, own);
        }
    }
    for (int r = 0; r < rows; r++) {
        d->offsets[r] = sum_of(sums[r]) * k->scaling, d->scales[r] = k->scaling;
#if defined(__AVX512VNNI__)
        d->scales[r] *= to_bytes(d->steps + r * dim, dim, (int)k->bits, most[r], d->bytes + 2 * r * dim);
#endif
    }
}

// Compute logits [columns] of `rows` adjacent queries. The last page may write up to a page and a vector past the end.
static void logits_of(const KeyCodes *k, Desk *d, int64_t head, const float *queries, int rows, float *const *logits) {
    int64_t pages = (k->columns + k->page - 1) / k->page, width = k->dim * k->bits / 8;
    for (int64_t page = 0; page < pages; page++) {
        const uint8_t *codes = k->codes + head * k->codes_head + page * k->page * width;
        prepare(k, d, head, page, queries, rows);
#if defined(__AVX512VNNI__)
        if (width % 16 == 0) {
            any_page_by_bytes(k, d, codes, width, rows, logits, page * k->page);
            continue;
        }
#endif
        for (int r = 0; r < rows; r++)
            page_by_floats(k, d->steps + r * k->dim, codes, width, d->offsets[r], logits[r] + page * k->page);
    }
}

// Return 0, or 1 if memory ran out.
int LS(code_logits)(const KeyCodes *k) {
    int failed = 0;
#pragma omp parallel for num_threads(k->threads) schedule(dynamic, 1) if (k->threads > 1)
    for (int64_t head = 0; head < k->heads; head++) {
        Desk d;
        if (desk_open(&d, k)) {
            take_queries(k, &d, head);
            for (int64_t first = 0; first < rows_of(k); first += TOGETHER) {
                int rows = (int)(rows_of(k) - first < TOGETHER ? rows_of(k) - first : TOGETHER);
                float *logits[TOGETHER];
                for (int r = 0; r < rows; r++) logits[r] = d.logits + r * d.stride;
                logits_of(k, &d, head, d.queries + first * k->dim, rows, logits);
                for (int r = 0; r < rows; r++)
                    memcpy(k->logits + (head * rows_of(k) + first + r) * k->columns, logits[r], k->columns * 4);
            }
        } else failed = 1;
        desk_close(&d);
    }
    return failed;
}

// Return the log of the sum of a row's exponentials over all columns, and write them, relative to the largest, to `weights`.
static float exponentials(const float *logits, int64_t columns, float *weights, float *total) {
    float most = -INFINITY;
    int64_t c = 0;
    vf mosts = splat(-INFINITY), sums = {};
    for (; c + VW <= columns; c += VW) mosts = vmax(mosts, load(logits + c));
    for (; c < columns; c++) most = logits[c] > most ? logits[c] : most;
    for (int l = 0; l < VW; l++) most = mosts[l] > most ? mosts[l] : most;
    float sum = 0;
    for (c = 0; c + VW <= columns; c += VW) {
        vf weight = exp2v((load(logits + c) - most) * LOG2E);
        sums += weight;
        store(weights + c, weight);
    }
    for (; c < columns; c++) sum += weights[c] = exp2f((logits[c] - most) * LOG2E);
    *total = sum + sum_of(sums);
    return most + logf(*total);
}

// Add the softmax of a row, given its exponentials, for columns below `tail`.
static void observe(const float *weights, float total, int64_t tail, float share, float *observed) {
    int64_t c = 0;
    share /= total;
    for (; c + VW <= tail; c += VW) store(observed + c, load(observed + c) + load(weights + c) * share);
    for (; c < tail; c++) observed[c] += weights[c] * share;
}

// Write for each column the largest logit of a row to d->best. relative: of the log of the row's softmax instead.
static void best_of_rows(const KeyCodes *k, Desk *d, int64_t head) {
    int64_t columns = k->columns;
    for (int64_t first = 0; first < rows_of(k); first += TOGETHER) {
        int rows = (int)(rows_of(k) - first < TOGETHER ? rows_of(k) - first : TOGETHER);
        float *logits[TOGETHER];
        for (int r = 0; r < rows; r++) logits[r] = first + r ? d->logits + r * d->stride : d->best;
        logits_of(k, d, head, d->queries + first * k->dim, rows, logits);
        for (int r = 0; r < rows; r++) {
            float base = 0, total;
            if (k->observed || k->relative) {
                float *weights = (float *)d->kept, log_sum = exponentials(logits[r], columns, weights, &total);
                if (k->observed) observe(weights, total, k->tail, 1.0f / rows_of(k), k->observed + head * k->tail);
                base = k->relative ? log_sum : 0;
            }
            if (first + r)
                for (int64_t c = 0; c < columns; c += VW) store(d->best + c, vmax(load(d->best + c), load(logits[r] + c) - base));
            else if (k->relative)
                for (int64_t c = 0; c < columns; c += VW) store(d->best + c, load(d->best + c) - base);
        }
    }
}

void LS(summarise_pages)(const KeyCodes *k) {
#pragma omp parallel for num_threads(k->threads) schedule(static) if (k->threads > 1)
    for (int64_t head = 0; head < k->heads; head++) summarise_head(k, head);
}

// Write the codes of the columns below the tail to d->codes, 0 for the base, which no column is below. Return whether the base lies
// below the tail.
static int rank(const KeyCodes *k, Desk *d, int64_t head) {
    for (int64_t c = 0; c < k->tail; c += VW) *(vu *)(d->codes + c) = codes_of(load(d->best + c));
    const int64_t *base = k->base + head * k->base_count;
    for (int64_t i = 0; i < k->base_count; i++) {
        if (base[i] < 0 || base[i] >= k->tail) return 0;
        d->codes[base[i]] = 0;
    }
    return 1;
}

// Write the base and the `wanted` best others, in order.
static void take(const KeyCodes *k, Desk *d, int64_t head, int64_t wanted, int64_t *out) {
    const int64_t *base = k->base + head * k->base_count;
    if (wanted) best_places(d->codes, k->tail, wanted, d->places, d->kept, d->jumps, 0);
    int64_t i = 0, j = 0;
    while (i < k->base_count || j < wanted)
        *out++ = j == wanted || (i < k->base_count && base[i] < d->jumps[j]) ? base[i++] : d->jumps[j++];
}

static void choose_of_head(const KeyCodes *k, Desk *d, int64_t head) {
    if (k->keys) summarise_head(k, head);
    take_queries(k, d, head);
    best_of_rows(k, d, head);
    k->counts[head] = -1;
    if (!rank(k, d, head)) return;
    int64_t wanted = k->budget, width = k->base_count + k->budget, *out = k->chosen + head * width;
    if (k->relative) {
        uint32_t least = code_of(k->threshold);
        wanted = 0;
        for (int64_t c = 0; c < k->tail; c++) wanted += d->codes[c] >= least;
        wanted = wanted < k->least ? k->least : wanted > k->budget ? k->budget : wanted;
    }
    int64_t filler = k->budget - wanted;
    k->counts[head] = k->base_count + wanted;
    for (int64_t i = 0; i < filler; i++) out[i] = -1;
    take(k, d, head, wanted, out + filler);
}

// Move the rows of `chosen` together, as wide as the longest head.
static void compact(const KeyCodes *k) {
    int64_t longest = 0, width = k->base_count + k->budget;
    for (int64_t head = 0; head < k->heads; head++) longest = k->counts[head] > longest ? k->counts[head] : longest;
    for (int64_t head = 0; head < k->heads && longest < width; head++)
        memmove(k->chosen + head * longest, k->chosen + (head + 1) * width - longest, longest * 8);
}

// Choose columns for `number` sessions of one layer, whose heads, groups and channels are alike. Each head must have at least `budget` columns before the tail outside the base.
// A head is computed alike whatever the others are. Return 0, or 1 if memory ran out.
int LS(choose_columns)(const KeyCodes *calls, int64_t number) {
    int failed = 0;
    int64_t heads = calls[0].heads, threads = calls[0].threads;
    KeyCodes largest = calls[0];
    for (int64_t i = 1; i < number; i++) {
        const KeyCodes *k = calls + i;
        largest.columns = k->columns > largest.columns ? k->columns : largest.columns;
        largest.page = k->page > largest.page ? k->page : largest.page;
        largest.budget = k->budget > largest.budget ? k->budget : largest.budget;
        largest.tokens = k->tokens > largest.tokens ? k->tokens : largest.tokens;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Desk d;
        if (!desk_open(&d, &largest)) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < number * heads; item++)
            if (!failed) choose_of_head(calls + item / heads, &d, item % heads);
        desk_close(&d);
    }
    for (int64_t i = 0; i < number && !failed; i++) compact(calls + i);
    return failed;
}
