// Compute logits of all keys from their codes, and select the best columns.
//
// A code is a step between the smallest and the largest value of a channel in its page: key = low + code * step. So the logit of a
// key is the product of the query with `low`, computed once per page, plus the product of its codes with query * step. Where the
// processor multiplies bytes, query * step is rounded to 8-bit integers (16-bit for codes of more than 2 bits). The error of the
// codes is larger than that of this rounding.
#include <stdlib.h>

#include "best.h"
#include "common.h"
#include "tile.h"

typedef struct {
    const float *queries;     // [heads][rows][dim], rows of a group adjacent
    const char *low, *high;   // [heads][pages][dim]
    const uint8_t *codes;     // [heads][pages][page][width]; byte j holds channels j, j + width, ..., the first lowest
    float *logits;            // [heads][rows][columns]
    const int64_t *base;      // [heads][base_count]: sorted columns that are always chosen, all below `tail`
    int64_t *chosen;          // [heads][base_count + budget]: those and the best others, sorted; -1 first where a head has fewer
    float *observed;          // [heads][tail]: the rows' softmax is added, mean over the rows; or NULL
    int64_t *counts;          // [heads]: columns that `code_threshold` chose, the base included
    int64_t bounds_head, codes_head;  // strides: in numbers, in bytes
    int64_t heads, rows, dim, page, bits, columns, half, base_count, tail, budget, least, threads;
    float scaling, threshold;  // of `code_threshold`: `least` to `budget` others whose log of a row's softmax reaches the threshold
} KeyCodes;

enum { TOGETHER = 4 };  // queries of a group per pass: bounds are read and codes unpacked once for all of them

typedef struct {
    int64_t stride;   // columns, padded by a page and two vectors
    float *steps;     // [TOGETHER][dim]: query * step of the current page
    int8_t *bytes;    // [TOGETHER][2][dim]: the same in units of largest / 127, and the remainder in units of that / 127
    float scales[TOGETHER], offsets[TOGETHER];  // logit = products * scale + offset
    float *logits;    // [TOGETHER][stride]
    float *best;      // [stride]: maximum over the rows
    uint32_t *codes, *kept;  // [stride] each
    int32_t *places;  // [stride]
    int64_t *jumps;   // [budget]
} Desk;

static int desk_open(Desk *d, const KeyCodes *k) {
    int64_t stride = k->columns + k->page + 2 * VW, rows = k->rows < TOGETHER ? k->rows : TOGETHER;
    d->stride = stride;
    d->steps = allocate(TOGETHER * k->dim * 4), d->bytes = allocate(TOGETHER * 2 * k->dim);
    d->logits = allocate(rows * stride * 4), d->best = allocate(stride * 4), d->codes = allocate(stride * 4), d->kept = allocate(stride * 4);
    d->places = allocate(stride * 4), d->jumps = allocate((k->budget + 1) * 8);
    return d->steps && d->bytes && d->logits && d->best && d->codes && d->kept && d->places && d->jumps;
}

static void desk_close(Desk *d) {
    free(d->steps), free(d->bytes), free(d->logits), free(d->best), free(d->codes), free(d->kept), free(d->places), free(d->jumps);
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
        if (desk_open(&d, k))
            for (int64_t first = 0; first < k->rows; first += TOGETHER) {
                int rows = (int)(k->rows - first < TOGETHER ? k->rows - first : TOGETHER);
                float *logits[TOGETHER];
                for (int r = 0; r < rows; r++) logits[r] = d.logits + r * d.stride;
                logits_of(k, &d, head, k->queries + (head * k->rows + first) * k->dim, rows, logits);
                for (int r = 0; r < rows; r++) memcpy(k->logits + (head * k->rows + first + r) * k->columns, logits[r], k->columns * 4);
            }
        else failed = 1;
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
static void best_of_rows(const KeyCodes *k, Desk *d, int64_t head, int relative) {
    int64_t columns = k->columns;
    for (int64_t first = 0; first < k->rows; first += TOGETHER) {
        int rows = (int)(k->rows - first < TOGETHER ? k->rows - first : TOGETHER);
        float *logits[TOGETHER];
        for (int r = 0; r < rows; r++) logits[r] = first + r ? d->logits + r * d->stride : d->best;
        logits_of(k, d, head, k->queries + (head * k->rows + first) * k->dim, rows, logits);
        for (int r = 0; r < rows; r++) {
            float base = 0, total;
            if (k->observed || relative) {
                float *weights = (float *)d->kept, log_sum = exponentials(logits[r], columns, weights, &total);
                if (k->observed) observe(weights, total, k->tail, 1.0f / k->rows, k->observed + head * k->tail);
                base = relative ? log_sum : 0;
            }
            if (first + r)
                for (int64_t c = 0; c < columns; c += VW) store(d->best + c, vmax(load(d->best + c), load(logits[r] + c) - base));
            else if (relative)
                for (int64_t c = 0; c < columns; c += VW) store(d->best + c, load(d->best + c) - base);
        }
    }
}

// Write the codes of the columns below the tail to d->codes, 0 for the base, which no column is below.
static void rank(const KeyCodes *k, Desk *d, int64_t head) {
    for (int64_t c = 0; c < k->tail; c += VW) *(vu *)(d->codes + c) = codes_of(load(d->best + c));
    const int64_t *base = k->base + head * k->base_count;
    for (int64_t i = 0; i < k->base_count; i++) d->codes[base[i]] = 0;
}

// Write the base and the `wanted` best others, in order.
static void take(const KeyCodes *k, Desk *d, int64_t head, int64_t wanted, int64_t *out) {
    const int64_t *base = k->base + head * k->base_count;
    if (wanted) best_places(d->codes, k->tail, wanted, d->places, d->kept, d->jumps, 0);
    int64_t i = 0, j = 0;
    while (i < k->base_count || j < wanted)
        *out++ = j == wanted || (i < k->base_count && base[i] < d->jumps[j]) ? base[i++] : d->jumps[j++];
}

static void jumps_of(const KeyCodes *k, Desk *d, int64_t head) {
    best_of_rows(k, d, head, 0);
    rank(k, d, head);
    take(k, d, head, k->budget, k->chosen + head * (k->base_count + k->budget));
}

static void heavy_of(const KeyCodes *k, Desk *d, int64_t head) {
    best_of_rows(k, d, head, 1);
    rank(k, d, head);
    int64_t wanted = 0, width = k->base_count + k->budget, *out = k->chosen + head * width;
    uint32_t least = code_of(k->threshold);
    for (int64_t c = 0; c < k->tail; c++) wanted += d->codes[c] >= least;
    wanted = wanted < k->least ? k->least : wanted > k->budget ? k->budget : wanted;
    int64_t filler = k->budget - wanted;
    k->counts[head] = k->base_count + wanted;
    for (int64_t i = 0; i < filler; i++) out[i] = -1;
    take(k, d, head, wanted, out + filler);
}

static int for_each_head(const KeyCodes *k, void (*of_head)(const KeyCodes *, Desk *, int64_t)) {
    int failed = 0;
#pragma omp parallel num_threads(k->threads) if (k->threads > 1)
    {
        Desk d;
        if (!desk_open(&d, k)) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < k->heads; head++)
            if (!failed) of_head(k, &d, head);
        desk_close(&d);
    }
    return failed;
}

// Select columns. Each head must have at least `budget` columns before the tail outside the base. Return 0, or 1 if memory ran out.
int LS(code_jumps)(const KeyCodes *k) { return for_each_head(k, jumps_of); }
int LS(code_threshold)(const KeyCodes *k) { return for_each_head(k, heavy_of); }

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

// Compute bounds and codes of the pages from `first` on. bits 0: bounds only. Whole pages of 2 bits are fitted.
void LS(summarise_pages)(const char *keys, char *low, char *high, uint8_t *codes, int64_t key_head, int64_t key_row,
                         int64_t bounds_head, int64_t codes_head, int64_t heads, int64_t dim, int64_t page, int64_t bits,
                         int64_t first, int64_t columns, int64_t half, int64_t threads) {
    int64_t size = half ? 2 : 4, width = dim * bits / 8, pages = (columns + page - 1) / page;
    int most = (1 << bits) - 1;
    int64_t per = bits ? 8 / bits : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t head = 0; head < heads; head++)
        for (int64_t p = first; p < pages; p++) {
            const char *rows = keys + (head * key_head + p * page * key_row) * size;
            int64_t count = columns - p * page < page ? columns - p * page : page;
            char *lows = low + (head * bounds_head + p * dim) * size, *highs = high + (head * bounds_head + p * dim) * size;
            uint8_t *packed = bits ? codes + head * codes_head + p * page * width : NULL;
            Keys k = {rows, count, key_row, 0, half};
            vf bounds[2][dim / VW];
            for (int64_t c = k.c = 0; c < dim; k.c = c += VW) {
                vf a = key(&k, 0), b = a;
                for (int64_t i = 1; i < count; i++) a = -vmax(-a, -key(&k, i)), b = vmax(b, key(&k, i));
                if (bits == 2 && count == page) fit(&k, most, &a, &b);
                if (half) store_bf16((bf16 *)lows + c, a), store_bf16((bf16 *)highs + c, b);
                else store((float *)lows + c, a), store((float *)highs + c, b);
                bounds[0][c / VW] = a;
                bounds[1][c / VW] = step_of(a, b, most);
            }
            for (int64_t i = 0; i < count && bits; i++)
                for (int64_t j = 0; j < width; j += VW) {
                    vi bytes = {};
                    for (int64_t part = 0; part < per; part++) {
                        int64_t c = k.c = part * width + j;
                        vi code = (vi)code_of_key(key(&k, i), bounds[0][c / VW], bounds[1][c / VW], most) & 0xffff;
                        bytes |= code << (int)(part * bits);
                    }
                    *(vb_loose *)(packed + i * width + j) = __builtin_convertvector(bytes, vb_loose);
                }
        }
}
