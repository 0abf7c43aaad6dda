// Compute what surrounds attention in a decoder layer of Llama's form, for the few bfloat16 rows of a decode step. Every number is rounded
// where transformers and torch round it, and added in the order in which torch adds, so that the result is theirs bit by bit.
#include "common.h"
#include "linear.h"
#include "vec.h"

typedef struct {
    const bf16 *norm, *query, *query_bias, *key, *key_bias, *value, *value_bias, *output, *output_bias;
    const bf16 *mlp_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
    float eps, mlp_eps;
} DecoderLayer;

// All buffers are contiguous, one row per session.
typedef struct {
    bf16 *hidden;                  // [rows][size]: the residual stream, changed in place
    bf16 *normed, *products;       // [rows][size]: scratch
    bf16 *keys, *values;           // [rows][kv_heads][dim]
    bf16 *attended;                // [rows][heads][dim]
    bf16 *gate, *up;               // [rows][inner]: scratch
    const bf16 *cos, *sin;         // [rows][dim]
    const bf16 *activation;        // [65536]: the activation of each bfloat16 number, by its bits
    int64_t rows, size, heads, kv_heads, dim, inner;
    int64_t lanes, threads;        // lanes: numbers per vector in torch's sums
} DecoderRows;

enum { LEVELS = 4, PARTS = 4, MOST_LANES = 16, POWER = 4, STEP = 1 << POWER };  // torch's, for rows of less than 2^19 vectors

INLINE float rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = x != x ? 0x7fc00000 : (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    x = rounded(x);
    memcpy(&bits, &x, 4);
    return bits >> 16;
}

// Sum the squares of a row in torch's order: vectors of `lanes` in four parts, each in levels: 16 sums of one are a sum of the next.
INLINE float sum_of_squares(const bf16 *x, int64_t size, const int lanes) {
    float sums[LEVELS][PARTS][MOST_LANES] = {};
    int64_t vectors = size / lanes, steps = vectors / PARTS, done = 0;
    while (done < steps) {
        int64_t end = done + STEP;
        for (; done < end && done < steps; done++)
            for (int p = 0; p < PARTS; p++)
                for (int l = 0; l < lanes; l++) {
                    float number = to_float(x[(done * PARTS + p) * lanes + l]);
                    sums[0][p][l] += number * number;  // exact in float
                }
        if (done < end) break;
        for (int level = 1; level < LEVELS; level++) {
            for (int p = 0; p < PARTS; p++)
                for (int l = 0; l < lanes; l++) sums[level][p][l] += sums[level - 1][p][l], sums[level - 1][p][l] = 0;
            if (done & ((int64_t)(STEP - 1) << (level * POWER))) break;
        }
    }
    for (int level = 1; level < LEVELS; level++)
        for (int p = 0; p < PARTS; p++)
            for (int l = 0; l < lanes; l++) sums[0][p][l] += sums[level][p][l];
    for (int64_t v = steps * PARTS; v < vectors; v++)
        for (int l = 0; l < lanes; l++) {
            float number = to_float(x[v * lanes + l]);
            sums[0][0][l] += number * number;
        }
    for (int p = 1; p < PARTS; p++)
        for (int l = 0; l < lanes; l++) sums[0][0][l] += sums[0][p][l];
    float sum = 0;
    for (int64_t i = vectors * lanes; i < size; i++) sum += to_float(x[i]) * to_float(x[i]);
    for (int l = 0; l < lanes; l++) sum += sums[0][0][l];
    return sum;
}

static float mean_of_squares(const bf16 *x, int64_t size, int64_t lanes) {
    return (lanes == 16 ? sum_of_squares(x, size, 16) : lanes == 8 ? sum_of_squares(x, size, 8) : sum_of_squares(x, size, 4)) / size;
}

// rows [count][size]; means [count].
void LS(mean_squares)(const bf16 *rows, float *means, int64_t count, int64_t size, int64_t lanes) {
    for (int64_t r = 0; r < count; r++) means[r] = mean_of_squares(rows + r * size, size, lanes);
}

// rows, output [count][size]; weight [size].
void LS(rms_norm)(const bf16 *rows, const bf16 *weight, bf16 *output, int64_t count, int64_t size, int64_t lanes, float eps) {
    for (int64_t r = 0; r < count; r++, rows += size, output += size) {
        float scale = 1 / sqrtf(mean_of_squares(rows, size, lanes) + eps);
        for (int64_t i = 0; i < size; i++) output[i] = to_bf16(to_float(weight[i]) * rounded(to_float(rows[i]) * scale));
    }
}

// Rotate heads [rows][heads][dim] in place: x cos + (-second half, first half) sin.
static void rotate(bf16 *x, const DecoderRows *r, int64_t heads) {
    int64_t half = r->dim / 2;
    for (int64_t row = 0; row < r->rows; row++) {
        const bf16 *cos = r->cos + row * r->dim, *sin = r->sin + row * r->dim;
        for (int64_t head = 0; head < heads; head++, x += r->dim)
            for (int64_t i = 0; i < half; i++) {
                float first = to_float(x[i]), second = to_float(x[half + i]);
                x[i] = to_bf16(rounded(first * to_float(cos[i])) + rounded(-second * to_float(sin[i])));
                x[half + i] = to_bf16(rounded(second * to_float(cos[half + i])) + rounded(first * to_float(sin[half + i])));
            }
    }
}

static void add_to(bf16 *sum, const bf16 *more, int64_t count) {
    for (int64_t i = 0; i < count; i++) sum[i] = to_bf16(to_float(sum[i]) + to_float(more[i]));
}

// Norm, products and rotation: writes `queries` [rows][heads][dim], and the rows' keys and values.
void LS(before_attention)(const DecoderLayer *l, const DecoderRows *r, bf16 *queries) {
    int64_t own = r->heads * r->dim, shared = r->kv_heads * r->dim;
    LS(rms_norm)(r->hidden, l->norm, r->normed, r->rows, r->size, r->lanes, l->eps);
    LS(linear)(r->normed, l->query, l->query_bias, queries, r->rows, r->size, own, r->threads);
    LS(linear)(r->normed, l->key, l->key_bias, r->keys, r->rows, r->size, shared, r->threads);
    LS(linear)(r->normed, l->value, l->value_bias, r->values, r->rows, r->size, shared, r->threads);
    rotate(queries, r, r->heads);
    rotate(r->keys, r, r->kv_heads);
}

// Output product and MLP: adds both to the residual stream.
void LS(after_attention)(const DecoderLayer *l, const DecoderRows *r) {
    LS(linear)(r->attended, l->output, l->output_bias, r->products, r->rows, r->heads * r->dim, r->size, r->threads);
    add_to(r->hidden, r->products, r->rows * r->size);
    LS(rms_norm)(r->hidden, l->mlp_norm, r->normed, r->rows, r->size, r->lanes, l->mlp_eps);
    LS(linear)(r->normed, l->gate, l->gate_bias, r->gate, r->rows, r->size, r->inner, r->threads);
    LS(linear)(r->normed, l->up, l->up_bias, r->up, r->rows, r->size, r->inner, r->threads);
    for (int64_t i = 0; i < r->rows * r->inner; i++) r->gate[i] = to_bf16(to_float(r->activation[r->gate[i]]) * to_float(r->up[i]));
    LS(linear)(r->gate, l->down, l->down_bias, r->products, r->rows, r->inner, r->size, r->threads);
    add_to(r->hidden, r->products, r->rows * r->size);
}
