// Select the columns of the best scores of each head, sorted.
#include <stdlib.h>

#include "best.h"
#include "common.h"

enum { RECENT, SINK, OTHER, FILLER, CLASSES };

// Write columns [heads][budget], budget at most total. Return 0, or 1 if memory ran out.
int LS(top_columns)(const float *scores, const int64_t *first_valid, int64_t *columns, int64_t heads, int64_t total, int64_t row,
                    int64_t budget, int64_t sinks, int64_t recent, int64_t threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t head = 0; head < heads; head++) {
        uint32_t *codes = malloc((total + VW) * 4), *kept = malloc((total + VW) * 4);
        int32_t *places = malloc((total + VW) * 4);
        if (codes && kept && places) {
            // Classes are runs of columns: filler, sinks, others, recent. A better class is selected before the next.
            int64_t start = first_valid ? first_valid[head] : 0, tail = total - recent > start ? total - recent : start;
            int64_t after = start + sinks < tail ? start + sinks : tail, edges[CLASSES + 1] = {0, start, after, tail, total};
            static const int run_of[CLASSES] = {3, 1, 2, 0};
            int64_t left = budget, taken[CLASSES];
            for (int64_t c = 0; c < total; c++) codes[c] = code_of(scores[head * row + c]);
            for (int class = 0; class < CLASSES; class++) {
                int run = run_of[class];
                int64_t size = edges[run + 1] - edges[run];
                taken[run] = size < left ? size : left;
                left -= taken[run];
            }
            int64_t *out = columns + head * budget;
            for (int run = 0; run < CLASSES; run++) {
                int64_t size = edges[run + 1] - edges[run];
                if (taken[run] == size)
                    for (int64_t c = edges[run]; c < edges[run + 1]; c++) *out++ = c;
                else if (taken[run])
                    best_places(codes + edges[run], size, taken[run], places, kept, out, edges[run]), out += taken[run];
            }
        } else {
            failed = 1;
        }
        free(codes), free(kept), free(places);
    }
    return failed;
}
