// Multiply few rows with bfloat16 weights that are read once, as a decode step does.
#include "linear.h"

enum { MOST = 4 };  // rows that are computed together, so that a weight is loaded once for them

typedef struct {
    const bf16 *inputs, *weight, *bias;
    bf16 *output;
    int64_t rows, in, out;
} Linear;

#if LS_BF16
enum { STEP = 2 * VW };
typedef __m512bh numbers;
INLINE numbers numbers_at(const bf16 *from) { return (numbers)_mm512_loadu_si512(from); }
INLINE vf multiplied(vf sum, numbers a, numbers b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
enum { STEP = VW };
typedef vf numbers;
INLINE numbers numbers_at(const bf16 *from) { return load_bf16(from); }
INLINE vf multiplied(vf sum, numbers a, numbers b) { return sum + a * b; }
#endif

// Return the products of `rows` input rows with VW / rows weight rows, row by row. A sum is built in the same order whatever is
// computed beside it, so that a row does not depend on the others.
INLINE vf products(const Linear *l, const bf16 *x, const bf16 *w, const int rows) {
    const int outputs = VW / rows;
    vf sums[VW] = {};
    int64_t i = 0;
    for (; i + STEP <= l->in; i += STEP) {
        numbers inputs[MOST];
        UNROLL for (int r = 0; r < rows; r++) inputs[r] = numbers_at(x + r * l->in + i);
        UNROLL for (int o = 0; o < outputs; o++) {
            numbers weights = numbers_at(w + o * l->in + i);
            UNROLL for (int r = 0; r < rows; r++) sums[r * outputs + o] = multiplied(sums[r * outputs + o], weights, inputs[r]);
        }
    }
    vf found = sums_of(sums);
    for (; i < l->in; i++)
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < outputs; o++) found[r * outputs + o] += to_float(x[r * l->in + i]) * to_float(w[o * l->in + i]);
    return found;
}

// Compute `rows` rows of VW outputs from `first` on.
INLINE void tile(const Linear *l, int64_t row, int64_t first, const int rows) {
    const int outputs = VW / rows;
    for (int64_t output = first; output < first + VW; output += outputs) {
        vf found = products(l, l->inputs + row * l->in, l->weight + output * l->in, rows);
        bf16 rounded[VW];
        if (l->bias)
            for (int i = 0; i < VW; i++) found[i] += to_float(l->bias[output + i % outputs]);
        store_bf16(rounded, found);
        for (int r = 0; r < rows; r++) memcpy(l->output + (row + r) * l->out + output, rounded + r * outputs, outputs * sizeof(bf16));
    }
}

static void outputs_from(const Linear *l, int64_t first) {
    int64_t row = 0;
    for (; row + 4 <= l->rows; row += 4) tile(l, row, first, 4);
    for (; row + 2 <= l->rows; row += 2) tile(l, row, first, 2);
    for (; row < l->rows; row++) tile(l, row, first, 1);
}

// All arrays are contiguous: inputs [rows, in], weight [out, in], bias [out] or NULL, output [rows, out]. out is at least VW, and the last
// tile ends at the last output: some outputs are then computed twice, alike.
void LS(linear)(const bf16 *inputs, const bf16 *weight, const bf16 *bias, bf16 *output, int64_t rows, int64_t in, int64_t out,
                int64_t threads) {
    Linear l = {inputs, weight, bias, output, rows, in, out};
    int64_t tiles = out / VW;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && in * out >= 1 << 18)
    for (int64_t t = 0; t < tiles; t++) outputs_from(&l, t * VW);
    if (out % VW) outputs_from(&l, out - VW);
}
