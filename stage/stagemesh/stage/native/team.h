/* The threads of one parallel region, and the work they deal among themselves. */
#ifndef STAGEMESH_TEAM_H
#define STAGEMESH_TEAM_H

#include <sched.h>
#include <stdatomic.h>

enum { SPINS_BEFORE_YIELD = 2000, CACHE_LINE = 64 };

/* What one thread has taken of its share, on a cache line of its own. */
typedef struct {
    _Alignas(CACHE_LINE) atomic_int taken;
} Share;

typedef struct {
    int size;
    Share *shares; /* [size] */
    _Alignas(CACHE_LINE) atomic_int arrived;
    atomic_int generation;
} Team;

static inline void team_init(Team *team, Share *shares, int size) {
    team->size = size;
    team->shares = shares;
    for (int i = 0; i < size; i++)
        atomic_init(&shares[i].taken, 0);
    atomic_init(&team->arrived, 0);
    atomic_init(&team->generation, 0);
}

/* Where a thread's share of `count` units begins. */
static inline int team_begin(const Team *team, int thread, int count) {
    return (int)((long)count * thread / team->size);
}

/* The next of `count` units of the current phase for a thread; -1 when there is none. Each thread's share lies in one
 * piece, so that it reads one stream of memory; who is done takes from the others, so that a thread whose core was
 * taken away holds them up by no more than a unit. */
static inline int team_take(Team *team, int thread, int count) {
    for (int i = 0; i < team->size; i++) {
        int owner = (thread + i) % team->size;
        int begin = team_begin(team, owner, count), end = team_begin(team, owner + 1, count);
        if (begin + atomic_load_explicit(&team->shares[owner].taken, memory_order_relaxed) >= end)
            continue;
        int unit = begin + atomic_fetch_add_explicit(&team->shares[owner].taken, 1, memory_order_relaxed);
        if (unit < end)
            return unit;
    }
    return -1;
}

/* Wait for all, and begin the next phase. Yields after a while: the core may be what the others wait for. */
static inline void team_meet(Team *team) {
    int generation = atomic_load_explicit(&team->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->size) {
        for (int i = 0; i < team->size; i++)
            atomic_store_explicit(&team->shares[i].taken, 0, memory_order_relaxed);
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->generation, generation + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->generation, memory_order_acquire) == generation; spins++) {
        if (spins < SPINS_BEFORE_YIELD)
            __builtin_ia32_pause();
        else
            sched_yield();
    }
}

#endif
