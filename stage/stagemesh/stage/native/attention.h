/* Attention of rows of one token over a paged cache, one row and KV head at a time. */
#ifndef STAGEMESH_ATTENTION_H
#define STAGEMESH_ATTENTION_H

#include <stdint.h>

#include "product.h"

enum { MAX_CHUNKS = 16 }; /* heads of up to 256 */

typedef struct {
    int64_t heads, kv_heads, head_dim, block_size, num_cells, table_width;
    float scale;
    const int64_t *positions; /* [rows] */
    const int32_t *tables;    /* [rows, table_width] */
    const float *cos, *sin;   /* [rows, head_dim]; the sines of the left half negated */
} Paged;

/* Rotate a head in place. */
AVX512 static void rotate(float *head, const float *cos, const float *sin, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float left = head[i], right = head[half + i];
        head[i] = left * cos[i] + right * sin[i];
        head[half + i] = right * cos[half + i] + left * sin[half + i];
    }
}

/* One query head, its width in chunks of 16 known when this is compiled. `scores` has room for the context. */
INLINED void attend_head(
    const float *query, const float *keys, const float *values, const int32_t *table, const Paged *paged, int length,
    float *scores, float *out, int fetch, int chunks) {
    __m512 parts[MAX_CHUNKS], most = _mm512_set1_ps(-__builtin_inff());
    int dim = chunks * LANES, size = (int)paged->block_size;
#pragma GCC unroll 16
    for (int c = 0; c < chunks; c++)
        parts[c] = _mm512_mul_ps(_mm512_loadu_ps(query + c * LANES), _mm512_set1_ps(paged->scale));
    for (int begin = 0; begin < length; begin += size) {
        const float *key = keys + (size_t)table[begin / size] * size * dim;
        const float *value = values + (size_t)table[begin / size] * size * dim;
        const float *next = begin + size < length ? keys + (size_t)table[begin / size + 1] * size * dim : value;
        int count = length - begin < size ? length - begin : size;
        for (int cell = 0; cell < count; cell++, key += dim) {
            __m512 sum = _mm512_mul_ps(parts[0], _mm512_loadu_ps(key));
#pragma GCC unroll 16
            for (int c = 1; c < chunks; c++)
                sum = _mm512_fmadd_ps(parts[c], _mm512_loadu_ps(key + c * LANES), sum);
            scores[begin + cell] = _mm512_reduce_add_ps(sum);
            if (fetch) /* the same cell of the next block, and the value that is needed after all keys */
#pragma GCC unroll 16
                for (int c = 0; c < chunks; c++) {
                    _mm_prefetch((const char *)(next + (size_t)cell * dim + c * LANES), _MM_HINT_T0);
                    _mm_prefetch((const char *)(value + (size_t)cell * dim + c * LANES), _MM_HINT_T0);
                }
        }
    }
    int at = 0;
    __mmask16 rest = (__mmask16)((1u << (length % LANES)) - 1);
    for (; at + LANES <= length; at += LANES)
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + at));
    most = _mm512_mask_max_ps(most, rest, most, _mm512_maskz_loadu_ps(rest, scores + at));
    __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most)), total = _mm512_setzero_ps();
    for (at = 0; at + LANES <= length; at += LANES) {
        __m512 p = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), highest));
        _mm512_storeu_ps(scores + at, p);
        total = _mm512_add_ps(total, p);
    }
    __m512 p = exp_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(rest, scores + at), highest));
    _mm512_mask_storeu_ps(scores + at, rest, p);
    total = _mm512_mask_add_ps(total, rest, total, p);
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
#pragma GCC unroll 16
    for (int c = 0; c < chunks; c++)
        parts[c] = _mm512_setzero_ps();
    for (int begin = 0; begin < length; begin += size) {
        const float *value = values + (size_t)table[begin / size] * size * dim;
        int count = length - begin < size ? length - begin : size;
        for (int cell = 0; cell < count; cell++, value += dim) {
            __m512 weight = _mm512_set1_ps(scores[begin + cell]);
#pragma GCC unroll 16
            for (int c = 0; c < chunks; c++)
                parts[c] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(value + c * LANES), parts[c]);
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < chunks; c++)
        _mm512_storeu_ps(out + c * LANES, _mm512_mul_ps(parts[c], share));
}

/* Rotate the heads of one row and KV head in `qkv` [rows, heads + 2 * kv_heads, head_dim], write its key and value to
 * the cache [2, kv_heads, num_cells, head_dim] and attend to all cells up to there. out is [rows, heads, head_dim]. */
AVX512 static void attend_unit(
    const Paged *paged, int row, int kv_head, float *qkv, float *cache, float *scores, float *out) {
    int dim = (int)paged->head_dim, group = (int)(paged->heads / paged->kv_heads);
    size_t plane = (size_t)paged->num_cells * dim;
    const float *cos = paged->cos + (size_t)row * dim, *sin = paged->sin + (size_t)row * dim;
    const int32_t *table = paged->tables + (size_t)row * paged->table_width;
    int64_t position = paged->positions[row];
    float *first = qkv + (size_t)row * (paged->heads + 2 * paged->kv_heads) * dim;
    float *query = first + (size_t)kv_head * group * dim;
    float *key = first + (size_t)(paged->heads + kv_head) * dim;
    float *keys = cache + (size_t)kv_head * plane, *values = keys + (size_t)paged->kv_heads * plane;
    size_t cell = (size_t)table[position / paged->block_size] * paged->block_size + position % paged->block_size;
    rotate(key, cos, sin, dim);
    __builtin_memcpy(keys + cell * dim, key, dim * sizeof(float));
    __builtin_memcpy(values + cell * dim, key + (size_t)paged->kv_heads * dim, dim * sizeof(float));
    for (int g = 0; g < group; g++, query += dim) {
        float *to = out + ((size_t)row * paged->heads + (size_t)kv_head * group + g) * dim;
        rotate(query, cos, sin, dim);
        switch (dim / LANES) {
#define CASE(CHUNKS) \
    case CHUNKS: attend_head(query, keys, values, table, paged, (int)position + 1, scores, to, !g, CHUNKS); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(12) CASE(16)
#undef CASE
        }
    }
}

#endif
