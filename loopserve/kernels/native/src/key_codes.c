// Logits of all keys from short codes of them, and the columns that they make worth a look.
//
// A key's channel is a step number between the smallest and the largest value in its page: key = low + code * step. So a page's
// logits are one product of the query with `low`, and for each key a product of its codes with query * step. Where the processor
// multiplies bytes that is made whole numbers of 8 bits, 16 for codes of more than 2: the codes' own error is larger.
#include <stdlib.h>

#include "best.h"
#include "common.h"
#include "tile.h"

typedef struct {
    const float *queries;     // [heads][rows][dim], those of a group together
    const char *low, *high;   // [heads][pages][dim]
    const uint8_t *codes;     // [heads][pages][page][width]; byte j holds channels j, j + width, ..., the first lowest
    float *logits;            // [heads][rows][columns]
    const int64_t *base;      // [heads][base_count]: sorted columns attended already, all below `tail`
    int64_t *chosen;          // [heads][base_count + budget]: those and the best others, sorted
    float *observed;          // [heads][tail]: the rows' softmax is added, mean over the rows; or NULL
    int64_t bounds_head, codes_head;  // strides: in numbers, in bytes
    int64_t heads, rows, dim, page, bits, columns, half, base_count, tail, budget, threads;
    float scaling;
} KeyCodes;

typedef struct {
    float *steps;     // [dim]: query * step
    int8_t *bytes;    // [2][dim]: the same in 127ths of the largest, and what that leaves in 127ths of one of those
    float *logits;    // [columns]: of one row
    float *best;      // [columns]: maximum over the rows
    uint32_t *codes, *kept;  // [columns] each
    int32_t *places;  // [columns]
    int64_t *jumps;   // [budget]
} Desk;

static int desk_open(Desk *d, const KeyCodes *k) {
    int64_t room_of = (k->columns + k->page + 2 * VW) * 4;
    *d = (Desk){room(k->dim * 4), room(2 * k->dim + 64), room(room_of), room(room_of), room(room_of), room(room_of), room(room_of),
                room((k->budget + 1) * 8)};
    return d->steps && d->bytes && d->logits && d->best && d->codes && d->kept && d->places && d->jumps;
}

static void desk_close(Desk *d) {
    free(d->steps), free(d->bytes), free(d->logits), free(d->best), free(d->codes), free(d->kept), free(d->places), free(d->jumps);
}

#if defined(__AVX512VNNI__)
// The codes of channels 64 z to 64 z + 63 of a key of `width` bytes, a byte each.
INLINE __m512i unpack(const uint8_t *key, int64_t width, int bits, int64_t z) {
    __m512i x;
    if (width == 16) {
        x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)key));
        x = _mm512_srlv_epi64(x, _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0));
    } else if (width == 32) {
        x = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)key));
        x = _mm512_srli_epi64(x, 2 * z * bits);
        x = _mm512_mask_srli_epi64(x, 0xf0, x, bits);
    } else {
        x = _mm512_srli_epi64(_mm512_loadu_si512(key + 64 * z % width), 64 * z / width * bits);
    }
    return bits == 8 ? x : _mm512_and_si512(x, _mm512_set1_epi8((1 << bits) - 1));
}

// width and bits are constants where this is inlined.
INLINE void page_by_bytes(const KeyCodes *k, const int8_t *steps, const uint8_t *codes, int64_t width, int bits, float scale,
                          float offset, float *logits) {
    for (int64_t at = 0; at < k->page; at += VW) {
        vf sums[VW];
        UNROLL for (int i = 0; i < VW; i++) {
            const uint8_t *key = codes + (at + i < k->page ? at + i : k->page - 1) * width;
            __m512i sum = _mm512_setzero_si512(), rest = _mm512_setzero_si512();
            for (int64_t z = 0; z < k->dim / 64; z++) {
                __m512i codes_of_z = unpack(key, width, bits, z);
                sum = _mm512_dpbusd_epi32(sum, codes_of_z, _mm512_loadu_si512(steps + 64 * z));
                if (bits > 2) rest = _mm512_dpbusd_epi32(rest, codes_of_z, _mm512_loadu_si512(steps + k->dim + 64 * z));
            }
            sums[i] = (vf)_mm512_cvtepi32_ps(sum);
            if (bits > 2) sums[i] += (vf)_mm512_cvtepi32_ps(rest) * (1.0f / 254);
        }
        store(logits + at, sums_of(sums) * scale + offset);
    }
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

// Logits [columns] of one query, page by page; the last page may write up to a page and a vector beyond.
static void logits_of(const KeyCodes *k, Desk *d, int64_t head, const float *query, float *logits) {
    int64_t pages = (k->columns + k->page - 1) / k->page, dim = k->dim, width = dim * k->bits / 8, size = k->half ? 2 : 4;
    float share = 1.0f / ((1 << k->bits) - 1);
    for (int64_t p = 0; p < pages; p++) {
        const char *low = k->low + (head * k->bounds_head + p * dim) * size, *high = k->high + (head * k->bounds_head + p * dim) * size;
        const uint8_t *codes = k->codes + head * k->codes_head + p * k->page * width;
        vf sum = {}, most = {};
        for (int64_t c = 0; c < dim; c += VW) {
            vf a = k->half ? load_bf16((const bf16 *)low + c) : load((const float *)low + c);
            vf b = k->half ? load_bf16((const bf16 *)high + c) : load((const float *)high + c);
            vf of = load(query + c), step = (b - a) * share * of;
            sum += a * of, most = vmax(most, vmax(step, -step));
            store(d->steps + c, step);
        }
        float offset = sum_of(sum) * k->scaling, *to = logits + p * k->page;
#if defined(__AVX512VNNI__)
        if (dim % 64 == 0 && (width == 16 || width % 32 == 0)) {
            float largest = _mm512_reduce_max_ps((__m512)most), scale = largest > 0 ? largest / 127 : 1;
            for (int64_t c = 0; c < dim; c += VW) {
                vf step = load(d->steps + c) * (1 / scale);
                __m512i whole = _mm512_cvtps_epi32((__m512)step);
                __m512i rest = _mm512_cvtps_epi32((__m512)((step - (vf)_mm512_cvtepi32_ps(whole)) * 254.0f));
                _mm_storeu_si128((__m128i *)(d->bytes + c), _mm512_cvtsepi32_epi8(whole));
                _mm_storeu_si128((__m128i *)(d->bytes + dim + c), _mm512_cvtsepi32_epi8(rest));
            }
            scale *= k->scaling;
            if (width == 16 && k->bits == 2) page_by_bytes(k, d->bytes, codes, 16, 2, scale, offset, to);
            else if (width == 32 && k->bits == 2) page_by_bytes(k, d->bytes, codes, 32, 2, scale, offset, to);
            else page_by_bytes(k, d->bytes, codes, width, k->bits, scale, offset, to);
            continue;
        }
#endif
        (void)most;
        page_by_floats(k, d->steps, codes, width, offset, to);
    }
}

// Returns 0, or 1 if memory ran out.
int LS(code_logits)(const KeyCodes *k) {
    int failed = 0;
#pragma omp parallel for num_threads(k->threads) schedule(dynamic, 1) if (k->threads > 1)
    for (int64_t head = 0; head < k->heads; head++) {
        Desk d;
        if (desk_open(&d, k))
            for (int64_t r = 0; r < k->rows; r++) {
                logits_of(k, &d, head, k->queries + (head * k->rows + r) * k->dim, d.logits);
                memcpy(k->logits + (head * k->rows + r) * k->columns, d.logits, k->columns * 4);
            }
        else failed = 1;
        desk_close(&d);
    }
    return failed;
}

// Add the row's softmax over all columns, as far as `tail`.
static void observe(const float *logits, int64_t columns, int64_t tail, float share, float *weights, float *observed) {
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
    share /= sum + sum_of(sums);
    for (c = 0; c + VW <= tail; c += VW) store(observed + c, load(observed + c) + load(weights + c) * share);
    for (; c < tail; c++) observed[c] += weights[c] * share;
}

static void jumps_of(const KeyCodes *k, Desk *d, int64_t head) {
    int64_t columns = k->columns;
    for (int64_t r = 0; r < k->rows; r++) {
        float *logits = r ? d->logits : d->best;
        logits_of(k, d, head, k->queries + (head * k->rows + r) * k->dim, logits);
        if (k->observed) observe(logits, columns, k->tail, 1.0f / k->rows, (float *)d->kept, k->observed + head * k->tail);
        if (r)
            for (int64_t c = 0; c < columns; c += VW) store(d->best + c, vmax(load(d->best + c), load(logits + c)));
    }
    for (int64_t c = 0; c < k->tail; c += VW) *(vu *)(d->codes + c) = codes_of(load(d->best + c));
    const int64_t *base = k->base + head * k->base_count;
    for (int64_t i = 0; i < k->base_count; i++) d->codes[base[i]] = 0;
    if (k->budget) best_places(d->codes, k->tail, k->budget, d->places, d->kept, d->jumps, 0);
    int64_t *out = k->chosen + head * (k->base_count + k->budget), i = 0, j = 0;
    while (i < k->base_count || j < k->budget)
        *out++ = j == k->budget || (i < k->base_count && base[i] < d->jumps[j]) ? base[i++] : d->jumps[j++];
}

// At least `budget` columns of each head are free: held, before the tail and not in the base. Returns 0, or 1 if memory ran out.
int LS(code_jumps)(const KeyCodes *k) {
    int failed = 0;
#pragma omp parallel num_threads(k->threads) if (k->threads > 1)
    {
        Desk d;
        if (!desk_open(&d, k)) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < k->heads; head++)
            if (!failed) jumps_of(k, &d, head);
        desk_close(&d);
    }
    return failed;
}

// Bounds and codes of the pages from `first` on. bits 0: bounds only.
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
#define KEY(i) (half ? load_bf16((const bf16 *)(rows + (i) * key_row * 2) + c) : load((const float *)(rows + (i) * key_row * 4) + c))
            vf bounds[2][dim / VW];
            for (int64_t c = 0; c < dim; c += VW) {
                vf a = KEY(0), b = a;
                for (int64_t i = 1; i < count; i++) a = -vmax(-a, -KEY(i)), b = vmax(b, KEY(i));
                if (half) store_bf16((bf16 *)lows + c, a), store_bf16((bf16 *)highs + c, b);
                else store((float *)lows + c, a), store((float *)highs + c, b);
                bounds[0][c / VW] = a;
                bounds[1][c / VW] = vmax((b - a) / (float)most, splat(1.1754943508222875e-38f));  // a step
            }
            for (int64_t i = 0; i < count && bits; i++)
                for (int64_t j = 0; j < width; j += VW) {
                    vi bytes = {};
                    for (int64_t part = 0; part < per; part++) {
                        int64_t c = part * width + j;
                        vf x = (KEY(i) - bounds[0][c / VW]) / bounds[1][c / VW];
                        vi code = (vi)(vmax(-vmax(-x, splat(-most)), (vf){}) + 12582912.0f) & 0xffff;  // rounded, in the low bits
                        bytes |= code << (int)(part * bits);
                    }
                    *(vb_loose *)(packed + i * width + j) = __builtin_convertvector(bytes, vb_loose);
                }
#undef KEY
        }
}
