// State of the greedy selection of lines of one head: gains, costs and coverage, and how taking a line changes them.
//
// A cell is covered if the vertical or the slash through it was taken, so that no copy of the rows is needed. Lines are grouped in
// blocks, each with an upper bound of the gain per cost of its lines. Gains only fall as lines are taken, so a bound stays valid;
// where a cost falls, the bound is raised.
#pragma once
#include "common.h"
#include "masses.h"
#include "rows.h"

typedef struct {
    Scores scores;         // inputs of the rows; unused where the rows are given
    const float *given;    // [heads][rows][total], or NULL
    const float *weights;  // [heads][rows]: weight of each row
    const uint8_t *forced;  // [heads][2][total]: lines taken first; kind 0 is vertical, 1 slash
    uint8_t *chosen;       // [heads][2][total]
    double *covered, *mass;  // [heads][rows]
    double *spent;         // [heads]
    int64_t new_tokens, tile;  // tile: a line costs keys per tile of this many rows; 0: a line costs its cells
    double alpha, floor;
    double most_cost;      // a head stops where its target would cost more
    double least_weight;   // a head stops where the best line adds less mass per computed cell
} Selection;

#define BLOCK 128
#define NEGLIGIBLE 1e-6  // share of the mass below the rounding of float rows
#define DRIFT 1e-4

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
    double most, least;         // largest weight; gains up to `least` count as 0
    double least_rate;          // least gain per cost of a line that is taken
    double *gain[2], *cost[2];  // [total] each; the gain of a taken line is -inf
    uint8_t *chosen[2];
    double *bound, *cheapest;   // [2 * blocks]: upper bound of gain per cost; lower bound of cost
    int32_t *best;              // [2 * blocks]: the line that attains the bound, where it is exact
    uint8_t *exact;
    uint8_t *computed;          // [total + tile]: entry o is the key o - (tile - 1) before the first row of a tile
    double *span;               // [total + tile]: share of the tiles whose key at this entry is in the block
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
    // Lines are padded to whole blocks and blocks to whole vectors. The padding has no gain.
    for (int kind = 0; kind < 2; kind++) g->gain[kind] = allocate(blocks * BLOCK * 8), g->cost[kind] = allocate(blocks * BLOCK * 8);
    g->weights = allocate(rows * 8), g->bound = allocate((2 * blocks + DW) * 8), g->cheapest = allocate(2 * blocks * 8);
    g->best = allocate(2 * blocks * 4), g->exact = allocate(2 * blocks);
    g->computed = allocate(total + s->tile), g->span = allocate((total + s->tile) * 8);
    g->candidates = allocate(total * sizeof(Candidate));
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

// Compute the gains of all lines from the uncovered cells under the row weights.
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

// Remove a row from the gains.
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

// Reduce the cost of lines first to last of a kind by one cell each.
static void cheapen(Greedy *g, int kind, int64_t first, int64_t last) {
    for (int64_t x = first; x <= last; x++) g->cost[kind][x] -= 1;
    for (int64_t b = first / BLOCK; first <= last && b <= last / BLOCK; b++) {
        int64_t at = kind * g->blocks + b;
        double before = g->cheapest[at], after = before - 1;
        g->exact[at] = 0;
        if (before == INFINITY) continue;  // no line of the block has a gain
        g->cheapest[at] = after;
        g->bound[at] = after > 0 ? g->bound[at] * before / after : INFINITY;
    }
}

// Reduce the cost of slashes near a taken one, since a tile computes their common keys once.
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

// Return the uncovered weighted mass on a line, recomputed, since gains drift by rounding.
static double mass_on(const Greedy *g, int kind, int64_t line) {
    double sum = 0;
    for (int64_t i = 0; i < g->rows; i++) {
        int64_t met = g->columns[i] - line;  // the line of the other kind that crosses it in this row
        if (met >= 0 && !g->chosen[1 - kind][met]) sum += g->weights[i] * g->p[i * g->stride + (kind ? met : line)];
    }
    return sum;
}

// Return whether a gain after many subtractions is rounding only. If so, set it to 0, so that the line is not taken.
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
