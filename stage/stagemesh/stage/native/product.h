/* Products of few rows, or many, with a weight that is read once.
 *
 * A weight [out, in] is kept in panels of 32 outputs, [ceil(out / 32)][in][32], the last one filled up with zeros: one
 * stream of memory. It is read in chunks that fit a core's first cache, each multiplied with all rows, up to 14 of
 * them held in registers at a time, while the next chunk is fetched. Rows come as tiles, each [in][rows of the tile], so that the
 * elements a step of the loop needs are neighbours. Every output is summed in the order of its inputs, whatever the
 * number of rows. */
#ifndef STAGEMESH_PRODUCT_H
#define STAGEMESH_PRODUCT_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))
#define INLINED static inline __attribute__((always_inline)) AVX512

enum {
    LANES = 16,
    PANEL = 2 * LANES,
    MAX_TILE = 14,    /* 28 sums, two of a weight and one element: the registers there are */
    CHUNK = 128,      /* inputs; 16 KiB of a panel */
    PAST_CACHE = 1 << 18, /* floats */
    BLOCK_ROWS = 256, /* whose tiles stay in a core's second cache while a weight passes */
    MAX_TILES = (BLOCK_ROWS + MAX_TILE - 1) / MAX_TILE,
};

static inline int panels_of(int out) { return (out + PANEL - 1) / PANEL; }

/* Tiles are as even as can be. A few rows make two, though one would do: while the second is multiplied with a chunk, the
 * memory catches up. */
static inline int tiles_of(int rows) {
    int least = rows > 4 ? 2 : 1, filled = (rows + MAX_TILE - 1) / MAX_TILE;
    return filled > least ? filled : least;
}
static inline int tile_begin(int rows, int tile) { return rows * tile / tiles_of(rows); }

INLINED __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x)); /* a NaN stays one */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f); /* Cephes' expf */
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* Add `inputs` of a panel times those of a tile to sums [rows][2], for a number of rows known when this is compiled.
 * `ahead` is fetched meanwhile, `lines` cache lines for each input. */
INLINED void multiply_rows(
    const float *panel, const float *tile, int inputs, const float *ahead, int lines, int rows, __m512 *sums) {
    __m512 left[MAX_TILE], right[MAX_TILE];
#pragma GCC unroll 14
    for (int m = 0; m < rows; m++)
        left[m] = sums[2 * m], right[m] = sums[2 * m + 1];
    for (int k = 0; k < inputs; k++) {
        __m512 first = _mm512_loadu_ps(panel), second = _mm512_loadu_ps(panel + LANES);
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        if (lines > 1)
            _mm_prefetch((const char *)(ahead + LANES), _MM_HINT_T1);
#pragma GCC unroll 14
        for (int m = 0; m < rows; m++) {
            __m512 x = _mm512_set1_ps(tile[m]);
            left[m] = _mm512_fmadd_ps(first, x, left[m]);
            right[m] = _mm512_fmadd_ps(second, x, right[m]);
        }
        panel += PANEL;
        tile += rows;
        ahead += lines * LANES;
    }
#pragma GCC unroll 14
    for (int m = 0; m < rows; m++)
        sums[2 * m] = left[m], sums[2 * m + 1] = right[m];
}

AVX512 static void multiply(
    const float *panel, const float *tile, int inputs, const float *ahead, int lines, int rows, __m512 *sums) {
    switch (rows) {
#define CASE(ROWS) \
    case ROWS: \
        if (lines == 1) \
            multiply_rows(panel, tile, inputs, ahead, 1, ROWS, sums); \
        else \
            multiply_rows(panel, tile, inputs, ahead, 2, ROWS, sums); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#undef CASE
    }
}

/* sums[m][2] = the 32 outputs of a panel for every row of a block. */
AVX512 static void panel_product(const float *panel, const float *tiles, int rows, int in, __m512 *sums) {
    int count = tiles_of(rows);
    for (int i = 0; i < 2 * rows; i++)
        sums[i] = _mm512_setzero_ps();
    for (int k = 0; k < in; k += CHUNK) {
        int inputs = in - k < CHUNK ? in - k : CHUNK;
        const float *chunk = panel + (size_t)k * PANEL, *ahead = chunk + CHUNK * PANEL;
        for (int tile = 0; tile < count; tile++) {
            int begin = tile_begin(rows, tile), own = tile_begin(rows, tile + 1) - begin;
            const float *x = tiles + (size_t)begin * in + (size_t)k * own;
            /* The first two tiles fetch half of the next chunk each; a lone one all of it. */
            int lines = count == 1 ? 2 : 1;
            multiply(chunk, x, inputs, ahead + (tile % 2) * inputs * LANES, lines, own, sums + 2 * begin);
        }
    }
}

/* Rows [rows, in] as a tile. With `gain` each is normed (root mean square) and multiplied by it. */
AVX512 static void spread(const float *x, int rows, int in, const float *gain, float eps, float *tile) {
    for (int m = 0; m < rows; m++) {
        const float *row = x + (size_t)m * in;
        if (!gain) {
            for (int k = 0; k < in; k++)
                tile[(size_t)k * rows + m] = row[k];
            continue;
        }
        __m512 squares = _mm512_setzero_ps();
        int k = 0;
        for (; k + LANES <= in; k += LANES) {
            __m512 v = _mm512_loadu_ps(row + k);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        float sum = _mm512_reduce_add_ps(squares);
        for (; k < in; k++)
            sum += row[k] * row[k];
        float scale = 1.0f / __builtin_sqrtf(sum / in + eps);
        for (k = 0; k < in; k++)
            tile[(size_t)k * rows + m] = row[k] * scale * gain[k];
    }
}

static inline __mmask16 lanes_of(int left) {
    return left >= LANES ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
}

/* One panel of y [rows, out], with `residual` (or NULL) added. */
AVX512 static void product_panel(
    const float *weight, int panel, const float *tiles, int rows, int in, int out, const float *residual, float *y) {
    __m512 sums[2 * BLOCK_ROWS];
    panel_product(weight + (size_t)panel * in * PANEL, tiles, rows, in, sums);
    /* Wide outputs, such as logits, are in no cache: a store that must fetch its line first holds up the weights. */
    int past_cache = out % LANES == 0 && (size_t)out * rows > PAST_CACHE && (uintptr_t)y % sizeof(__m512) == 0;
    for (int half = 0; half < 2; half++) {
        int column = panel * PANEL + half * LANES;
        __mmask16 lanes = lanes_of(out - column);
        for (int m = 0; m < rows; m++) {
            size_t at = (size_t)m * out + column;
            __m512 sum = sums[2 * m + half];
            if (residual)
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, residual + at));
            if (past_cache && lanes)
                _mm512_stream_ps(y + at, sum);
            else
                _mm512_mask_storeu_ps(y + at, lanes, sum);
        }
    }
}

/* silu(gate) * up of 16 columns, as tiles of the next product's input. A panel has 16 of the gate's, then of up's. */
AVX512 static void gated_panel(
    const float *weight, int panel, const float *tiles, int rows, int in, int columns, float *activated) {
    __m512 sums[2 * BLOCK_ROWS];
    int column = panel * LANES, lanes = columns - column < LANES ? columns - column : LANES;
    panel_product(weight + (size_t)panel * in * PANEL, tiles, rows, in, sums);
    for (int tile = 0; tile < tiles_of(rows); tile++) {
        int begin = tile_begin(rows, tile), own = tile_begin(rows, tile + 1) - begin;
        float *out = activated + (size_t)begin * columns + (size_t)column * own;
        for (int m = 0; m < own; m++) {
            __m512 gate = sums[2 * (begin + m)], minus = _mm512_sub_ps(_mm512_setzero_ps(), gate);
            __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1.0f), exp_ps(minus)));
            float value[LANES];
            _mm512_storeu_ps(value, _mm512_mul_ps(silu, sums[2 * (begin + m) + 1]));
            for (int lane = 0; lane < lanes; lane++)
                out[lane * own + m] = value[lane];
        }
    }
}

#endif
