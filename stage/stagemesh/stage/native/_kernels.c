/* stagemesh.stage.native._kernels: float32 products and decoder layers on CPUs with AVX-512.
 *
 * Tensors are addresses; the callers in Python see to shapes, types and that memory is contiguous. Nothing here outlives
 * a call: scratch is the call's own, so any number of threads may be inside. A call's threads are OpenMP's, from the
 * library that torch has loaded, so that the two share one pool. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

typedef unsigned long long Address;

/* As Python packs it: struct "=8q2d". */
typedef struct {
    int64_t heads, kv_heads, head_dim, block_size, num_cells, hidden, columns, threads;
    double eps, scale;
} Shape;

typedef struct {
    Work work;
    const Layer *layers;
    float *x;
    int begin, end, rows, longest;
} Halves;

typedef struct {
    const float *x, *weight, *residual;
    float *y, *tiles;
    int rows, in, out;
} Linear;

/* What each thread of a call does; `own` is scratch of that thread. */
typedef void (*Part)(Team *team, int thread, const void *of, float *own);

static float *scratch(size_t floats) {
    return aligned_alloc(CACHE_LINE, (floats * sizeof(float) / CACHE_LINE + 1) * CACHE_LINE);
}

/* Whether it ran: there may be no memory. */
static int in_parallel(int threads, size_t own_floats, Part part, const void *of) {
    Team team;
    Share *shares = aligned_alloc(CACHE_LINE, (size_t)threads * sizeof(Share));
    atomic_int failed = !shares;
#pragma omp parallel num_threads(threads)
    {
        float *own = scratch(own_floats);
        if (!own)
            failed = 1;
#pragma omp barrier
#pragma omp single
        if (!failed)
            team_init(&team, shares, omp_get_num_threads());
        if (!failed)
            part(&team, omp_get_thread_num(), of, own);
        free(own);
    }
    free(shares);
    return !failed;
}

AVX512 static void linear_part(Team *team, int thread, const void *argument, float *own) {
    const Linear *of = argument;
    for (int first = 0; first < of->rows; first += BLOCK_ROWS) {
        int rows = of->rows - first < BLOCK_ROWS ? of->rows - first : BLOCK_ROWS;
        size_t at = (size_t)first * of->out;
        const float *tiles = gather(team, thread, of->x + (size_t)first * of->in, rows, of->in, NULL, 0, own, of->tiles);
        product(team, thread, of->weight, tiles, rows, of->in, of->out, of->residual ? of->residual + at : NULL, of->y + at,
                NULL, 0, 0);
    }
}

static PyObject *linear(PyObject *self, PyObject *args) {
    Address x, weight, residual, y;
    int rows, in, out, threads, ran = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKKiiii", &x, &weight, &residual, &y, &rows, &in, &out, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    float *tiles = rows > OWN_ROWS ? scratch((size_t)(rows < BLOCK_ROWS ? rows : BLOCK_ROWS) * in) : NULL;
    Linear of = {(float *)x, (float *)weight, (float *)residual, (float *)y, tiles, rows, in, out};
    if (tiles || rows <= OWN_ROWS)
        ran = in_parallel(threads, (size_t)OWN_ROWS * in, linear_part, &of);
    free(tiles);
    Py_END_ALLOW_THREADS
    return ran ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

AVX512 static void halves_part(Team *team, int thread, const void *argument, float *own) {
    const Halves *of = argument;
    float *scores = own + (size_t)OWN_ROWS * (of->work.hidden + of->work.paged.heads * of->work.paged.head_dim);
    for (int half = of->begin; half < of->end; half++) {
        const Layer *layer = of->layers + half / 2;
        if (half % 2 == 0) {
            attention_half(team, thread, &of->work, layer, of->x, of->rows, own, scores);
            continue;
        }
        for (int first = 0; first < of->rows; first += BLOCK_ROWS) {
            int rows = of->rows - first < BLOCK_ROWS ? of->rows - first : BLOCK_ROWS;
            mlp_half(team, thread, &of->work, layer, half + 1 < of->end ? layer + 1 : NULL, of->x + (size_t)first * of->work.hidden, rows, own);
        }
    }
}

static int run_halves(Halves *of, int threads) {
    Work *work = &of->work;
    int block = of->rows < BLOCK_ROWS ? of->rows : BLOCK_ROWS;
    size_t width = work->paged.heads * work->paged.head_dim;
    size_t tiles = (size_t)block * (work->hidden + width), activated = (size_t)block * work->columns;
    size_t rows = of->longest ? of->rows : 0, heads = width + 2 * work->paged.kv_heads * work->paged.head_dim;
    float *memory = scratch(tiles + activated + rows * (heads + width));
    if (!memory)
        return 0;
    work->tiles = memory;
    work->activated = memory + tiles;
    work->qkv = work->activated + activated;
    work->attended = work->qkv + rows * heads;
    int ran = in_parallel(threads, OWN_ROWS * (work->hidden + width) + of->longest + LANES, halves_part, of);
    free(memory);
    return ran;
}

static PyObject *halves(PyObject *self, PyObject *args) {
    const char *shape_bytes, *layers;
    Py_ssize_t shape_size, layers_size;
    Address x, positions, tables, cos, sin;
    int begin, end, rows, table_width, longest, add_residual, ran;
    (void)self;
    if (!PyArg_ParseTuple(
            args, "y#y#iiKiiKKiiKK", &shape_bytes, &shape_size, &layers, &layers_size, &begin, &end, &x, &rows,
            &add_residual, &positions, &tables, &table_width, &longest, &cos, &sin))
        return NULL;
    Shape shape;
    if (shape_size != sizeof shape || begin < 0 || end > 2 * (layers_size / (Py_ssize_t)sizeof(Layer)))
        return PyErr_Format(PyExc_ValueError, "halves %d to %d are not of these layers", begin, end);
    memcpy(&shape, shape_bytes, sizeof shape);
    Halves of = {
        .work = {
            .hidden = (int)shape.hidden, .columns = (int)shape.columns, .add_residual = add_residual,
            .eps = (float)shape.eps,
            .paged = {
                shape.heads, shape.kv_heads, shape.head_dim, shape.block_size, shape.num_cells, table_width,
                (float)shape.scale, (int64_t *)positions, (int32_t *)tables, (float *)cos, (float *)sin}},
        .layers = (const Layer *)layers, .x = (float *)x, .begin = begin, .end = end, .rows = rows,
        .longest = longest};
    Py_BEGIN_ALLOW_THREADS
    ran = run_halves(&of, (int)shape.threads);
    Py_END_ALLOW_THREADS
    return ran ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *turn(PyObject *self, PyObject *args) {
    Address from, to;
    int panels, in, threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKiii", &from, &to, &panels, &in, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads)
    for (int panel = 0; panel < panels; panel++) {
        size_t at = (size_t)panel * in * PANEL;
        spread((const float *)from + at, PANEL, in, NULL, 0, (float *)to + at);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *is_supported(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
}

static PyMethodDef methods[] = {
    {"is_supported", is_supported, METH_NOARGS, "Whether this CPU has the instructions."},
    {"turn", turn, METH_VARARGS, "[panels, 32, in] to [panels, in, 32]."},
    {"linear", linear, METH_VARARGS, "y = x W^T (+ residual) for a weight in panels."},
    {"halves", halves, METH_VARARGS, "Halves [begin, end) of decoder layers, x in place."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
