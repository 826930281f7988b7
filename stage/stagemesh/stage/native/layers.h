/* The halves of a decoder layer, in place: attention over rows of one token, and the MLP over any rows. */
#ifndef STAGEMESH_LAYERS_H
#define STAGEMESH_LAYERS_H

#include "attention.h"
#include "team.h"

enum { OWN_ROWS = 16 };

static inline int gated_panels_of(int columns) { return (columns + LANES - 1) / LANES; }

typedef struct {
    const float *attention_norm, *qkv, *out;
    float *cache;
    const float *mlp_norm, *gate_up, *down;
} Layer;

typedef struct {
    int hidden, columns, add_residual;
    float eps;
    Paged paged;
    float *tiles;     /* scratch: [rows of a block, the widest input of a product] */
    float *qkv;       /* [rows, heads + 2 * kv_heads, head_dim] */
    float *attended;  /* [rows, heads, head_dim] */
    float *activated; /* [rows of a block, columns] */
} Work;

/* The input of a product as tiles. A few rows every thread spreads for itself, which costs less than to share them. */
AVX512 static const float *gather(
    Team *team, int thread, const float *x, int rows, int in, const float *gain, float eps, float *own, float *shared) {
    int count = tiles_of(rows), alone = rows <= OWN_ROWS;
    float *tiles = alone ? own : shared;
    for (int next = 0, tile; (tile = alone ? next++ : team_take(team, thread, count)) >= 0 && tile < count;) {
        int begin = tile_begin(rows, tile);
        size_t at = (size_t)begin * in;
        spread(x + at, tile_begin(rows, tile + 1) - begin, in, gain, eps, tiles + at);
    }
    if (!alone)
        team_meet(team);
    return tiles;
}

/* Fetch the head of a thread's share of the weight that comes next, while others finish and inputs are made ready. */
static inline void look_ahead(const Team *team, int thread, const float *weight, int panels, int in) {
    if (!weight)
        return;
    const float *head = weight + (size_t)team_begin(team, thread, panels) * in * PANEL;
    int inputs = in < 2 * CHUNK ? in : 2 * CHUNK;
    for (int i = 0; i < inputs * PANEL; i += LANES)
        _mm_prefetch((const char *)(head + i), _MM_HINT_T1);
}

AVX512 static void product(
    Team *team, int thread, const float *weight, const float *tiles, int rows, int in, int out, const float *residual,
    float *y, const float *next, int next_panels, int next_in) {
    for (int panel; (panel = team_take(team, thread, panels_of(out))) >= 0;)
        product_panel(weight, panel, tiles, rows, in, out, residual, y);
    look_ahead(team, thread, next, next_panels, next_in);
    team_meet(team);
}

AVX512 static void attention_half(
    Team *team, int thread, const Work *work, const Layer *layer, float *x, int rows, float *own, float *scores) {
    const Paged *paged = &work->paged;
    int hidden = work->hidden, kv_heads = (int)paged->kv_heads, width = (int)(paged->heads * paged->head_dim);
    int all = width + 2 * kv_heads * (int)paged->head_dim;
    const float *tiles = gather(team, thread, x, rows, hidden, layer->attention_norm, work->eps, own, work->tiles);
    product(team, thread, layer->qkv, tiles, rows, hidden, all, NULL, work->qkv, layer->out, panels_of(hidden), width);
    for (int unit; (unit = team_take(team, thread, rows * kv_heads)) >= 0;)
        attend_unit(paged, unit / kv_heads, unit % kv_heads, work->qkv, layer->cache, scores, work->attended);
    team_meet(team);
    tiles = gather(team, thread, work->attended, rows, width, NULL, 0, own, work->tiles);
    product(
        team, thread, layer->out, tiles, rows, width, hidden, work->add_residual ? x : NULL, x, layer->gate_up,
        gated_panels_of(work->columns), hidden);
}

AVX512 static void mlp_half(
    Team *team, int thread, const Work *work, const Layer *layer, const Layer *next, float *x, int rows, float *own) {
    int hidden = work->hidden, columns = work->columns;
    const float *tiles = gather(team, thread, x, rows, hidden, layer->mlp_norm, work->eps, own, work->tiles);
    for (int panel; (panel = team_take(team, thread, gated_panels_of(columns))) >= 0;)
        gated_panel(layer->gate_up, panel, tiles, rows, hidden, columns, work->activated);
    look_ahead(team, thread, layer->down, panels_of(hidden), columns);
    team_meet(team);
    int all = (int)((work->paged.heads + 2 * work->paged.kv_heads) * work->paged.head_dim);
    product(
        team, thread, layer->down, work->activated, rows, columns, hidden, work->add_residual ? x : NULL, x,
        next ? next->qkv : NULL, panels_of(all), hidden);
}

#endif
