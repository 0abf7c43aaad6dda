// Select the lines of each head that cover a share of its sampled attention at the lowest cost: exact greedy, line by line.
//
// Only the block of lines with the highest bound of gain per cost is searched for its best line; see greedy.h.
#include "greedy.h"

#define WORTHWHILE 16  // fewest verticals that are taken together

typedef double vd __attribute__((vector_size(VW * 4)));
typedef int64_t vl __attribute__((vector_size(VW * 4)));
typedef double vd_loose __attribute__((vector_size(VW * 4), aligned(8), may_alias));

INLINE vd choose(vl mask, vd a, vd b) { return (vd)((mask & (vl)a) | (~mask & (vl)b)); }

// Find the largest of `count` numbers (a multiple of DW) and its first index.
static int64_t first_largest(const double *x, int64_t count, double *largest) {
    vd most = *(const vd_loose *)x;
    for (int64_t i = DW; i < count; i += DW) {
        vd y = *(const vd_loose *)(x + i);
        most = choose(y > most, y, most);
    }
    double best = most[0];
    for (int l = 1; l < DW; l++) best = most[l] > best ? most[l] : best;
    *largest = best;
    for (int64_t i = 0; i < count; i += DW) {
        vl equal = *(const vd_loose *)(x + i) == best;
        for (int l = 0; l < DW; l++)
            if (equal[l]) return i + l;
    }
    return 0;  // not reached, since no number is NaN
}

static void look_into(Greedy *g, int64_t b) {
    int kind = b >= g->blocks;
    int64_t from = (b - kind * g->blocks) * BLOCK;
    const double *gain = g->gain[kind] + from, *cost = g->cost[kind] + from;  // padding has no gain: see greedy_open
    double ratios[BLOCK] __attribute__((aligned(64))), best;
    vd least = (vd){} + INFINITY;
    for (int64_t x = 0; x < BLOCK; x += DW) {
        vd gains = *(const vd_loose *)(gain + x), costs = *(const vd_loose *)(cost + x);
        vl worth = gains > g->least;
        *(vd *)(ratios + x) = choose(worth, gains / costs, (vd){} - 1.0);
        least = choose(worth & (costs < least), costs, least);
    }
    int64_t place = first_largest(ratios, BLOCK, &best);
    double cheapest = least[0];
    for (int l = 1; l < DW; l++) cheapest = least[l] < cheapest ? least[l] : cheapest;
    g->bound[b] = best, g->best[b] = from + place, g->exact[b] = 1;
    g->cheapest[b] = cheapest;
}

// Take the line of the highest gain per cost. Ties: a vertical before a slash, then the lower index. Return 0 if there is none, if
// its rate is below the least, or if the missing mass would cost too much at it: no later line has a higher rate.
static int take_best(Greedy *g, double missing, double most_cost) {
    for (;;) {
        double bound;
        int64_t b = first_largest(g->bound, (2 * g->blocks + DW - 1) / DW * DW, &bound);
        if (bound < 0) return 0;
        if (!g->exact[b]) {
            look_into(g, b);
            continue;
        }
        int kind = b >= g->blocks;
        int64_t line = g->best[b];
        if (is_rounding(g, kind, line)) continue;
        if (bound < g->least_rate || g->spent + missing / bound > most_cost) return 0;
        take(g, kind, line);
        return 1;
    }
}

// Order by descending ratio, then by line.
static int by_ratio(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->ratio != y->ratio ? (x->ratio < y->ratio) - (x->ratio > y->ratio) : (x->line > y->line) - (x->line < y->line);
}

static int by_line(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return (x->line > y->line) - (x->line < y->line);
}

// Return the exact best gain per cost of a slash, or -1 if none has a gain.
static double best_slash(Greedy *g) {
    for (;;) {
        double bound;
        int64_t b = g->blocks + first_largest(g->bound + g->blocks, (g->blocks + DW - 1) / DW * DW, &bound);
        if (bound < 0 || g->exact[b]) return bound;
        look_into(g, b);
    }
}

// Take all verticals whose gain per cost exceeds that of every slash, as taking lines one by one would, where lines cost keys in tiles.
// Verticals change neither the gains of other verticals nor any cost. So they are taken together, row by row in memory order.
// Return their number.
static int64_t take_verticals(Greedy *g, double missing, double most_cost) {
    double slash = best_slash(g), spent = g->spent;
    int64_t count = 0, taken = 0;
    for (int64_t b = 0; b < g->blocks; b++) {
        if (g->bound[b] < slash || g->bound[b] < 0) continue;
        for (int64_t x = b * BLOCK; x < (b + 1) * BLOCK && x < g->total; x++) {
            double gain = g->gain[0][x];
            if (gain > g->least && gain >= slash * g->cost[0][x]) g->candidates[count++] = (Candidate){gain / g->cost[0][x], x};
        }
    }
    if (count < WORTHWHILE) return 0;
    qsort(g->candidates, count, sizeof(Candidate), by_ratio);
    for (int64_t c = 0; c < count && missing > 0; c++) {
        Candidate next = g->candidates[c];
        if (is_rounding(g, 0, next.line)) continue;
        if (next.ratio < g->least_rate || spent + missing / next.ratio > most_cost) break;
        spent += g->cost[0][next.line], missing -= g->gain[0][next.line];
        g->candidates[taken++] = next;
    }
    qsort(g->candidates, taken, sizeof(Candidate), by_line);
    for (int64_t i = 0; i < g->rows; i++) {
        const float *row = g->p + i * g->stride;
        double weight = g->weights[i], covered = 0;
        for (int64_t c = 0; c < taken; c++) {
            int64_t line = g->candidates[c].line, met = g->columns[i] - line;
            if (met < 0 || g->chosen[1][met]) continue;
            covered += row[line];
            g->gain[1][met] -= weight * row[line];
        }
        g->covered[i] += covered, g->total_covered += weight * covered;
    }
    for (int64_t c = 0; c < taken; c++) {
        int64_t line = g->candidates[c].line;
        g->chosen[0][line] = 1, g->gain[0][line] = -INFINITY, g->exact[line / BLOCK] = 0;
    }
    if (taken) memset(g->exact + g->blocks, 0, g->blocks);
    g->spent = spent;
    return taken;
}

// Take lines until `target` is covered, until the best one is below the least rate, or until the rest would cost too much.
static void take_until(Greedy *g, double target, double most_cost) {
    int pause = 0;  // steps until the next attempt, after one that found few verticals
    while (g->total_covered < target) {
        if (g->tile && pause-- <= 0) {
            if (take_verticals(g, target - g->total_covered, most_cost)) continue;
            pause = WORTHWHILE;
        }
        if (!take_best(g, target - g->total_covered, most_cost)) return;
    }
}

static void lift_rows(Greedy *g, double floor, const double *mass, double most_cost) {
    g->total_covered = 0, g->least_rate = 0;  // a row must reach its floor, whatever its lines hold
    for (int64_t i = 0; i < g->rows; i++) g->weights[i] = g->covered[i] < (floor - NEGLIGIBLE) * mass[i];
    weigh(g);
    for (;;) {
        int below = 0;
        for (int64_t i = 0; i < g->rows; i++) {
            if (g->weights[i] == 0) continue;
            if (g->covered[i] < (floor - NEGLIGIBLE) * mass[i]) below = 1;
            else drop_row(g, i);
        }
        if (!below || !take_best(g, 0, most_cost)) return;
    }
}

// Select the lines of one head. clean: copy of rows that are not all finite, allocated at first need. Return 0 if memory ran out.
static int select_head(Greedy *g, const Selection *s, int64_t head, const float *p, int64_t stride, const float *vertical,
                       const float *backwards, float **clean) {
    int64_t total = g->total, rows = g->rows;
    const uint8_t *forced = s->forced + head * 2 * total;
    double *mass = s->mass + head * rows, whole = 0, weight = 0;
    g->stride = stride, g->covered = s->covered + head * rows, g->spent = 0, g->total_covered = 0;
    for (int kind = 0; kind < 2; kind++) g->chosen[kind] = s->chosen + (head * 2 + kind) * total;
    memset(g->chosen[0], 0, 2 * total);
    for (int64_t i = 0; i < rows; i++) {
        mass[i] = sum_of_row(p + i * stride, g->columns[i] + 1);
        if (isfinite(mass[i]) || p == *clean) continue;
        if (!*clean) *clean = allocate(rows * stride * 4);
        if (!*clean) return 0;
        finite_rows(p, *clean, rows, total, stride);
        p = *clean, vertical = NULL, i = -1;  // recompute the sums
    }
    g->p = p;
    int equal = 1;
    for (int64_t i = 0; i < rows; i++) {
        g->weights[i] = s->weights[head * rows + i];
        equal &= g->weights[i] == 1;
        g->covered[i] = 0, whole += mass[i] * g->weights[i], weight += g->weights[i];
    }
    g->least_rate = s->least_weight * weight / (s->tile ? 1 : s->new_tokens);
    price(g);
    if (vertical && equal) {
        for (int64_t x = 0; x < total; x++) g->gain[0][x] = vertical[x], g->gain[1][x] = backwards[total - 1 - x];
        g->most = 1, g->least = 1e-12;
        forget_bounds(g);
    } else {
        weigh(g);
    }
    for (int kind = 0; kind < 2; kind++)
        for (int64_t x = 0; x < total; x++)
            if (forced[kind * total + x]) take(g, kind, x);
    double target = (s->alpha - NEGLIGIBLE) * whole;
    take_until(g, target, s->most_cost);
    if (s->floor > 0) lift_rows(g, s->floor, mass, s->most_cost);
    s->spent[head] = g->spent;
    return 1;
}

// Return 0, or 1 if memory ran out.
int LS(select_lines)(const Selection *s) {
    const Scores *of = &s->scores;
    int failed = 0;
#pragma omp parallel num_threads(of->threads) if (of->threads > 1)
    {
        Greedy g;
        Tile t = {0};
        float *p = NULL, *vertical = NULL, *backwards = NULL, *clean = NULL;
        // A line is read across the rows. With a power of two as distance, all would map to one set of the cache.
        int64_t stride = s->given ? of->total : (of->total + 15) / 16 * 16 + 16;
        int ready = greedy_open(&g, s);
        if (!s->given) {
            p = allocate(of->rows * stride * 4), vertical = allocate(of->total * 4), backwards = allocate(of->total * 4);
            ready = ready && p && vertical && backwards && tile_open(&t, of->dim, of->half, of->scaling);
        }
        if (!ready) failed = 1;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < of->heads; head++) {
            if (failed) continue;
            if (!s->given) softmax_rows(&t, of, head, p, stride, vertical, backwards);
            const float *rows = s->given ? s->given + head * of->rows * stride : p;
            if (!select_head(&g, s, head, rows, stride, vertical, backwards, &clean)) failed = 1;
        }
        greedy_close(&g), tile_close(&t);
        free(p), free(vertical), free(backwards), free(clean);
    }
    return failed;
}
