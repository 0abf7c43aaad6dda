// The lines of each head that hold a wanted share of its sampled attention at the lowest cost: the exact greedy, line by line.
//
// Lines stand in blocks; each block knows a bound of the best gain per cost in it. Gains only fall as lines are taken, so a bound
// stays true until it is looked at; where a cost falls, bounds are raised. Only the block with the highest bound is looked into.
// A cell is covered if the vertical or the slash through it was taken, so no copy of the rows is kept.
#include "common.h"
#include "masses.h"
#include "rows.h"

typedef struct {
    Scores scores;         // what to compute the rows from; unused where they are given
    const float *given;    // [heads][rows][total], or NULL
    const float *weights;  // [heads][rows]: what a row's mass counts
    const uint8_t *forced;  // [heads][2][total]: lines taken first; kind 0 is vertical, 1 slash
    uint8_t *chosen;       // [heads][2][total]
    double *covered, *mass;  // [heads][rows]
    double *spent;         // [heads]
    int64_t new_tokens, tile;  // tile: rows of a kernel's tiles whose keys a line costs; 0: a line costs its cells
    double alpha, floor;
    double most_cost;      // where more is needed, the head is given up
} Selection;

#define BLOCK 128
#define NEGLIGIBLE 1e-6  // of a mass of 1: rows arrive in float
#define DRIFT 1e-4
#define WORTHWHILE 16  // verticals that are worth taking together

typedef double vd __attribute__((vector_size(VW * 4)));
typedef int64_t vl __attribute__((vector_size(VW * 4)));
typedef double vd_loose __attribute__((vector_size(VW * 4), aligned(8), may_alias));
#define DW (VW / 2)

typedef struct {
    double ratio;  // gain per cost
    int64_t line;
} Candidate;

typedef struct {
    int64_t rows, total, history, new_tokens, tile, blocks;  // blocks of one kind
    const int64_t *columns;
    const float *p;        // [rows][total], `stride` numbers apart
    int64_t stride;
    double *weights, *covered;  // [rows]
    double most, least;         // largest weight; gains up to `least` are none
    double *gain[2], *cost[2];  // [total] each; the gain of a line that was taken is -inf
    uint8_t *chosen[2];
    double *bound, *cheapest;   // [2 * blocks]: of gain per cost; of cost, a lower bound
    int32_t *best;              // [2 * blocks]: the line that reaches the bound, if it is exact
    uint8_t *exact;
    uint8_t *computed;          // [total + tile]: entry o stands for the key o - (tile - 1) before a tile's first row
    double *span;               // [total + tile]: share of the tiles in which that key lies in the block
    Candidate *candidates;      // [total]: verticals that are taken together
    double spent, total_covered;
} Greedy;

static double length_of(const Greedy *g, int64_t line) {
    return g->new_tokens - (line > g->history ? line - g->history : 0);
}

static int greedy_open(Greedy *g, const Selection *s) {
    int64_t total = s->scores.total, rows = s->scores.rows, blocks = (total + BLOCK - 1) / BLOCK;
    *g = (Greedy){.rows = rows, .total = total, .history = total - s->new_tokens, .new_tokens = s->new_tokens, .tile = s->tile,
                  .blocks = blocks, .columns = s->scores.columns};
    // Lines fill whole blocks and blocks whole vectors; what stands behind the last brings nothing.
    for (int kind = 0; kind < 2; kind++) g->gain[kind] = room(blocks * BLOCK * 8), g->cost[kind] = room(blocks * BLOCK * 8);
    g->weights = room(rows * 8), g->bound = room((2 * blocks + DW) * 8), g->cheapest = room(2 * blocks * 8);
    g->best = room(2 * blocks * 4), g->exact = room(2 * blocks);
    g->computed = room(total + s->tile), g->span = room((total + s->tile) * 8);
    g->candidates = room(total * sizeof(Candidate));
    if (!(g->gain[0] && g->gain[1] && g->cost[0] && g->cost[1] && g->weights && g->bound && g->cheapest && g->best && g->exact &&
          g->computed && g->span && g->candidates))
        return 0;
    for (int kind = 0; kind < 2; kind++)
        for (int64_t x = total; x < blocks * BLOCK; x++) g->gain[kind][x] = -INFINITY, g->cost[kind][x] = 1;
    for (int64_t b = 2 * blocks; b < 2 * blocks + DW; b++) g->bound[b] = -1;
    return 1;
}

static void greedy_close(Greedy *g) {
    for (int kind = 0; kind < 2; kind++) free(g->gain[kind]), free(g->cost[kind]);
    free(g->weights), free(g->bound), free(g->cheapest), free(g->best), free(g->exact), free(g->computed), free(g->span);
    free(g->candidates);
}

static void forget_bounds(Greedy *g) {
    for (int64_t b = 0; b < 2 * g->blocks; b++) g->bound[b] = INFINITY, g->exact[b] = 0;
}

static void price(Greedy *g) {
    for (int64_t x = 0; x < g->total; x++) g->cost[0][x] = g->cost[1][x] = length_of(g, x);
    if (g->tile) {
        int64_t tile = g->tile;
        double m = g->new_tokens, sum = 0;
        memset(g->computed, 0, g->total + tile);
        for (int64_t o = 0; o < g->total + tile - 1; o++) g->span[o] = o < tile - 1 ? 1 : length_of(g, o - (tile - 1)) / m;
        for (int64_t o = 0; o < tile - 1; o++) sum += g->span[o];
        for (int64_t x = 0; x < g->total; x++) {
            sum += g->span[x + tile - 1];
            g->cost[0][x] /= m, g->cost[1][x] = sum;
            sum -= g->span[x];
        }
    }
    for (int64_t b = 0; b < 2 * g->blocks; b++) {
        double least = INFINITY;
        int64_t from = b % g->blocks * BLOCK, to = from + BLOCK < g->total ? from + BLOCK : g->total;
        for (int64_t x = from; x < to; x++) least = fmin(least, g->cost[b / g->blocks][x]);
        g->cheapest[b] = least;
    }
}

// Gains of all lines from the cells that are not covered, under the rows' weights.
static void weigh(Greedy *g) {
    memset(g->gain[0], 0, g->total * 8), memset(g->gain[1], 0, g->total * 8);
    double most = 0;
    for (int64_t i = 0; i < g->rows; i++) {
        const float *row = g->p + i * g->stride;
        double weight = g->weights[i];
        int64_t column = g->columns[i];
        most = fmax(most, weight);
        if (weight == 0) continue;
        for (int64_t k = 0; k <= column; k++) {
            double mass = g->chosen[0][k] | g->chosen[1][column - k] ? 0 : weight * row[k];
            g->gain[0][k] += mass;
            g->gain[1][column - k] += mass;
        }
    }
    for (int kind = 0; kind < 2; kind++)
        for (int64_t x = 0; x < g->total; x++)
            if (g->chosen[kind][x]) g->gain[kind][x] = -INFINITY;
    g->most = most, g->least = 1e-12 * most;
    forget_bounds(g);
}

// A row counts no longer.
static void drop_row(Greedy *g, int64_t i) {
    const float *row = g->p + i * g->stride;
    int64_t column = g->columns[i];
    double weight = g->weights[i];
    g->weights[i] = 0;
    for (int64_t k = 0; k <= column; k++) {
        double mass = g->chosen[0][k] | g->chosen[1][column - k] ? 0 : weight * row[k];
        g->gain[0][k] -= mass;
        g->gain[1][column - k] -= mass;
    }
    memset(g->exact, 0, 2 * g->blocks);
}

// Of lines first to last of a kind, one cell each has become cheaper.
static void cheapen(Greedy *g, int kind, int64_t first, int64_t last) {
    for (int64_t x = first; x <= last; x++) g->cost[kind][x] -= 1;
    for (int64_t b = first / BLOCK; first <= last && b <= last / BLOCK; b++) {
        int64_t at = kind * g->blocks + b;
        double before = g->cheapest[at], after = before - 1;
        g->exact[at] = 0;
        if (before == INFINITY) continue;  // no line there brings anything
        g->cheapest[at] = after;
        g->bound[at] = after > 0 ? g->bound[at] * before / after : INFINITY;
    }
}

// The keys that a tile computes for a slash are computed once: slashes nearby become cheaper.
static void compute(Greedy *g, int64_t line) {
    int64_t tile = g->tile, from = line - tile + 1 > 0 ? line - tile + 1 : 0;
    int64_t to = line + tile - 1 < g->total - 1 ? line + tile - 1 : g->total - 1;  // slashes whose cost changes
    memset(g->computed + line, 1, tile);
    double sum = 0;
    for (int64_t o = from; o < from + tile - 1; o++) sum += g->computed[o] ? 0 : g->span[o];
    for (int64_t x = from; x <= to; x++) {
        sum += g->computed[x + tile - 1] ? 0 : g->span[x + tile - 1];
        g->cost[1][x] = sum < 0.5 / g->new_tokens ? 0 : sum;
        sum -= g->computed[x] ? 0 : g->span[x];
    }
    for (int64_t b = from / BLOCK; b <= to / BLOCK; b++) g->bound[g->blocks + b] = INFINITY, g->exact[g->blocks + b] = 0;
}

// Uncovered weighted mass on a line, summed anew: gains drift by rounding.
static double mass_on(const Greedy *g, int kind, int64_t line) {
    double sum = 0;
    for (int64_t i = 0; i < g->rows; i++) {
        int64_t met = g->columns[i] - line;  // the line of the other kind that crosses it in this row
        if (met >= 0 && !g->chosen[1 - kind][met]) sum += g->weights[i] * g->p[i * g->stride + (kind ? met : line)];
    }
    return sum;
}

// What is left of a gain after many subtractions may be rounding only; such a line must not be taken, and brings nothing any more.
static int is_rounding(Greedy *g, int kind, int64_t line) {
    if (g->gain[kind][line] >= DRIFT * g->most || mass_on(g, kind, line) > g->least) return 0;
    g->gain[kind][line] = 0, g->exact[kind * g->blocks + line / BLOCK] = 0;
    return 1;
}

static void take(Greedy *g, int kind, int64_t line) {
    g->chosen[kind][line] = 1;
    g->gain[kind][line] = -INFINITY;
    g->spent += g->cost[kind][line];
    for (int64_t i = 0; i < g->rows; i++) {
        int64_t met = g->columns[i] - line;
        if (met < 0 || g->chosen[1 - kind][met]) continue;
        double mass = g->p[i * g->stride + (kind ? met : line)], weighed = mass * g->weights[i];
        g->covered[i] += mass;
        g->total_covered += weighed;
        g->gain[1 - kind][met] -= weighed;
        g->exact[(1 - kind) * g->blocks + met / BLOCK] = 0;
    }
    g->exact[kind * g->blocks + line / BLOCK] = 0;
    if (g->tile == 0) cheapen(g, 1 - kind, g->history > line ? g->history - line : 0, g->total - 1 - line);
    else if (kind == 1) compute(g, line);
}

INLINE vd choose(vl mask, vd a, vd b) { return (vd)((mask & (vl)a) | (~mask & (vl)b)); }

// The largest of `count` numbers (a multiple of DW), and the first place where it stands.
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
    return 0;  // not reached: no number here is NaN
}

static void look_into(Greedy *g, int64_t b) {
    int kind = b >= g->blocks;
    int64_t from = (b - kind * g->blocks) * BLOCK;
    const double *gain = g->gain[kind] + from, *cost = g->cost[kind] + from;  // behind the last line no gain: see open
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

// Take the line of the highest gain per cost; of equals a vertical before a slash, then the lower index. 0 if there is none, or if
// at its rate the missing mass would cost too much: no later line brings more.
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
        if (g->spent + missing / bound > most_cost) return 0;
        take(g, kind, line);
        return 1;
    }
}

// By falling ratio, then by line.
static int by_ratio(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->ratio != y->ratio ? (x->ratio < y->ratio) - (x->ratio > y->ratio) : (x->line > y->line) - (x->line < y->line);
}

static int by_line(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return (x->line > y->line) - (x->line < y->line);
}

// The best gain per cost of a slash, exactly; -1 if none brings anything.
static double best_slash(Greedy *g) {
    for (;;) {
        double bound;
        int64_t b = g->blocks + first_largest(g->bound + g->blocks, (g->blocks + DW - 1) / DW * DW, &bound);
        if (bound < 0 || g->exact[b]) return bound;
        look_into(g, b);
    }
}

// What taking lines one by one comes to while no slash is worth as much as the next vertical, where lines cost their keys in tiles:
// verticals change neither each other's gains nor any cost, so all of them are taken at once, row by row, as the rows lie in memory.
// Returns how many.
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
        if (spent + missing / next.ratio > most_cost) break;
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

// Lines until `target` is covered, or until the rest would cost too much.
static void take_until(Greedy *g, double target, double most_cost) {
    int pause = 0;  // where few verticals stand above the best slash, the next time is not at once
    while (g->total_covered < target) {
        if (g->tile && pause-- <= 0) {
            if (take_verticals(g, target - g->total_covered, most_cost)) continue;
            pause = WORTHWHILE;
        }
        if (!take_best(g, target - g->total_covered, most_cost)) return;
    }
}

static void lift_rows(Greedy *g, double floor, const double *mass, double most_cost) {
    g->total_covered = 0;
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

// clean: room for rows of which some number is not finite, made when first needed. Returns 0 if memory ran out.
static int select_head(Greedy *g, const Selection *s, int64_t head, const float *p, int64_t stride, const float *vertical,
                       const float *backwards, float **clean) {
    int64_t total = g->total, rows = g->rows;
    const uint8_t *forced = s->forced + head * 2 * total;
    double *mass = s->mass + head * rows, whole = 0;
    g->stride = stride, g->covered = s->covered + head * rows, g->spent = 0, g->total_covered = 0;
    for (int kind = 0; kind < 2; kind++) g->chosen[kind] = s->chosen + (head * 2 + kind) * total;
    memset(g->chosen[0], 0, 2 * total);
    for (int64_t i = 0; i < rows; i++) {
        mass[i] = sum_of_row(p + i * stride, g->columns[i] + 1);
        if (isfinite(mass[i]) || p == *clean) continue;
        if (!*clean) *clean = room(rows * stride * 4);
        if (!*clean) return 0;
        finite_rows(p, *clean, rows, total, stride);
        p = *clean, vertical = NULL, i = -1;  // sum them anew
    }
    g->p = p;
    int equal = 1;
    for (int64_t i = 0; i < rows; i++) {
        g->weights[i] = s->weights[head * rows + i];
        equal &= g->weights[i] == 1;
        g->covered[i] = 0, whole += mass[i] * g->weights[i];
    }
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

// Returns 0, or 1 if memory ran out.
int LS(select_lines)(const Selection *s) {
    const Scores *of = &s->scores;
    int failed = 0;
#pragma omp parallel num_threads(of->threads) if (of->threads > 1)
    {
        Greedy g;
        Tile t = {0};
        float *p = NULL, *vertical = NULL, *backwards = NULL, *clean = NULL;
        // A line is read across the rows: at a distance that is a power of two they would all fall into one set of the cache.
        int64_t stride = s->given ? of->total : (of->total + 15) / 16 * 16 + 16;
        int ready = greedy_open(&g, s);
        if (!s->given) {
            p = room(of->rows * stride * 4), vertical = room(of->total * 4), backwards = room(of->total * 4);
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
