// The columns of the best scores of each head, sorted: a radix search for the last score that gets in, then one sweep.
#include "common.h"
#include "vec.h"
#include <stdlib.h>

enum { RECENT, SINK, OTHER, FILLER, CLASSES };

// Larger floats have larger codes; NaN counts as lowest, the two zeros as one.
static uint32_t code_of(float x) {
    uint32_t bits;
    x = x == x ? x + 0.0f : -INFINITY;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The code that the `wanted`-th best of columns from <= c < to has, and how many of those equal to it still get in.
static uint32_t threshold(const uint32_t *codes, int64_t from, int64_t to, int64_t wanted, int64_t *equal) {
    static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
    uint32_t found = 0, known = 0;  // the bits found so far, and their mask
    for (int pass = 0; pass < 3; pass++) {
        int64_t counts[2048] = {0};
        uint32_t mask = (1u << widths[pass]) - 1;
        for (int64_t c = from; c < to; c++)
            if ((codes[c] & known) == found) counts[codes[c] >> shifts[pass] & mask]++;
        int64_t bin = mask;
        while (counts[bin] < wanted) wanted -= counts[bin--];
        found |= (uint32_t)bin << shifts[pass], known |= mask << shifts[pass];
    }
    *equal = wanted;
    return found;
}

// Columns [heads][budget], budget at most total. Returns 0, or 1 if memory ran out.
int LS(top_columns)(const float *scores, const int64_t *first_valid, int64_t *columns, int64_t heads, int64_t total, int64_t row,
                    int64_t budget, int64_t sinks, int64_t recent, int64_t threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t head = 0; head < heads; head++) {
        uint32_t *codes = malloc((total + 1) * 4);
        if (!codes) { failed = 1; continue; }
        int64_t start = first_valid ? first_valid[head] : 0;
        for (int64_t c = 0; c < total; c++) codes[c] = code_of(scores[head * row + c]);
        // Classes are runs of columns: filler, sinks, others, recent; the better class gets in whole before the next is asked.
        int64_t edges[CLASSES + 1], tail = total - recent > start ? total - recent : start, head_end = start + sinks;
        if (head_end > tail) head_end = tail;
        edges[0] = 0, edges[1] = start, edges[2] = head_end, edges[3] = tail, edges[4] = total;
        static const int run_of[CLASSES] = {3, 1, 2, 0};
        int64_t *out = columns + head * budget, left = budget;
        int64_t equal[CLASSES] = {0};
        uint32_t least[CLASSES];
        for (int run = 0; run < CLASSES; run++) least[run] = 0xffffffff;
        for (int class = 0; class < CLASSES && left > 0; class++) {
            int run = run_of[class];
            int64_t size = edges[run + 1] - edges[run];
            if (size <= left) least[run] = 0, equal[run] = size, left -= size;
            else least[run] = threshold(codes, edges[run], edges[run + 1], left, &equal[run]), left = 0;
        }
        for (int run = 0; run < CLASSES; run++)
            for (int64_t c = edges[run]; c < edges[run + 1]; c++) {
                if (codes[c] > least[run]) *out++ = c;
                else if (codes[c] == least[run] && equal[run] > 0) *out++ = c, equal[run]--;
            }
        free(codes);
    }
    return failed;
}
