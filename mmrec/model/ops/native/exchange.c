/* Means and copies over the processes of one machine, and a relay between them, through memory that they share.

   Each process has a line of `lines`: how many exchanges it has begun, the sizes of the last two, and the system's
   numbers of it and of its parent. It writes what it gives to its slot, counts, waits until all others have counted as
   far, and reads all slots in their order, so that all get the same bits. There are two sets of slots in turn: a process
   that writes to one again knows that all have read it, since they have counted the exchange between. */

#define _GNU_SOURCE
#include "kernels.h"

#ifndef _WIN32
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE 20000 /* turns of waiting, some 100 microseconds, before the core is offered to others */

enum { DONE, NO_ANSWER, DIFFERENT_SIZES };

/* A line of the memory that is shared, of 64 bytes. */
typedef struct {
    int64_t begun, sizes[2], process, parent, unused[3];
} line;

/* What all functions take: the memory, numbers of 4 bytes in a slot, who this is, of how many, seconds to wait. */
typedef struct {
    line *lines;
    char *slots;
    integer room, rank, processes;
    double limit;
} group;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline void pause_turn(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Whether a process has ended, also where its parent has not waited for it yet, and may never do so: the system tells
   the parent, and gives its children another parent. */
static int has_ended(const line *own, const line *theirs) {
    pid_t process = (pid_t)theirs->process;
    siginfo_t found = {0};
    if (!waitid(P_PID, (id_t)process, &found, WEXITED | WNOHANG | WNOWAIT) && found.si_pid == process) return 1;
    if (own->parent == theirs->process) return getppid() != process;
    return kill(process, 0) && errno == ESRCH;
}

/* The slot of a process in the exchange that this process begins next, or has begun. */
static char *slot_of(const group *all, integer process, int64_t exchange) {
    return all->slots + ((exchange & 1) * all->processes + process) * all->room * 4;
}

/* Wait until a process has counted as far as `count`. */
static int await(const group *all, integer other, int64_t count) {
    line *theirs = &all->lines[other];
    double until = 0;
    for (int64_t turn = 1; __atomic_load_n(&theirs->begun, __ATOMIC_ACQUIRE) < count; turn++) {
        pause_turn();
        if (turn < PATIENCE) continue;
        sched_yield();
        if (turn < 2 * PATIENCE) continue;
        struct timespec rest = {0, 200000};
        nanosleep(&rest, NULL);
        double now = seconds();
        if (until == 0) until = now + all->limit;
        if (now > until || has_ended(&all->lines[all->rank], theirs)) return NO_ANSWER;
    }
    return DONE;
}

/* Count, and wait until all have counted as far, with as much to exchange. All are waited for where sizes differ, too:
   who goes on after that overwrites a size that another has yet to read. */
static int meet(const group *all, int64_t size) {
    int result = DONE;
    line *own = &all->lines[all->rank];
    int64_t mine = own->begun + 1;
    own->sizes[mine & 1] = size;
    __atomic_store_n(&own->begun, mine, __ATOMIC_RELEASE);
    for (integer other = 0; other < all->processes; other++) {
        if (await(all, other, mine)) return NO_ANSWER;
        if (all->lines[other].sizes[mine & 1] != size) result = DIFFERENT_SIZES;
    }
    return result;
}

/* The numbers `from` to `to` of many tensors behind each other: to or from a slot. */
typedef void of_part(const group *all, int64_t exchange, integer place, float *x, integer count);

static void over(float **tensors, const int64_t *sizes, integer count, integer from, integer to, const group *all,
                 int64_t exchange, of_part *function) {
    for (integer n = 0, start = 0; n < count && start < to; start += sizes[n++]) {
        integer first = start > from ? start : from, end = start + sizes[n] < to ? start + sizes[n] : to;
        if (first < end) function(all, exchange, first - from, tensors[n] + (first - start), end - first);
    }
}

static void give(const group *all, int64_t exchange, integer place, float *x, integer count) {
    memcpy((float *)slot_of(all, all->rank, exchange) + place, x, count * sizeof(float));
}

static void take_mean(const group *all, int64_t exchange, integer place, float *x, integer count) {
    const float *first = (const float *)slot_of(all, 0, exchange) + place;
    const float *second = (const float *)slot_of(all, 1, exchange) + place;
    float scale = 1.0f / (float)all->processes;
    VECTORIZE for (integer n = 0; n < count; n++) x[n] = first[n] + second[n];
    for (integer other = 2; other < all->processes; other++) {
        const float *next = (const float *)slot_of(all, other, exchange) + place;
        VECTORIZE for (integer n = 0; n < count; n++) x[n] += next[n];
    }
    VECTORIZE for (integer n = 0; n < count; n++) x[n] *= scale;
}

/* Each of `count` float32 tensors <- the mean of all processes' one, two of them or more. */
EXPORT int exchange_mean(const group *all, integer count, float **tensors, const int64_t *sizes) {
    integer total = 0;
    for (integer n = 0; n < count; n++) total += sizes[n];
    for (integer from = 0; from < total; from += all->room) {
        integer to = from + all->room < total ? from + all->room : total;
        int64_t exchange = all->lines[all->rank].begun + 1;
        over(tensors, sizes, count, from, to, all, exchange, give);
        int failed = meet(all, to - from);
        if (failed) return failed;
        over(tensors, sizes, count, from, to, all, exchange, take_mean);
    }
    return DONE;
}

/* everyone [processes, bytes] <- each process's own [bytes]. */
EXPORT int exchange_copies(const group *all, integer bytes, const char *own, char *everyone) {
    for (integer from = 0; from < bytes; from += all->room * 4) {
        integer part = bytes - from < all->room * 4 ? bytes - from : all->room * 4;
        int64_t exchange = all->lines[all->rank].begun + 1;
        memcpy(slot_of(all, all->rank, exchange), own + from, part);
        int failed = meet(all, part);
        if (failed) return failed;
        for (integer other = 0; other < all->processes; other++)
            memcpy(everyone + other * bytes + from, slot_of(all, other, exchange), part);
    }
    return DONE;
}

/* A relay has memory of its own, with one slot a process, in which what it gives stands at a place that belongs to it.
   A process says by a count how much it has given, and the next process waits for that count. It may write to a place
   again as soon as it has taken what followed from what stood there, since the next process has read that by then. */

/* Give `bytes` of `from` to the next process, at `place` of the slot; `count` of all that was ever given is there then. */
EXPORT int relay_give(const group *all, integer count, integer place, integer bytes, const char *from) {
    memcpy(all->slots + all->rank * all->room * 4 + place, from, bytes);
    __atomic_store_n(&all->lines[all->rank].begun, count, __ATOMIC_RELEASE);
    return DONE;
}

/* to [bytes] <- what stands at `place` of the process before this one, once that has given as much as `count`. */
EXPORT int relay_take(const group *all, integer count, integer place, integer bytes, char *to) {
    integer other = (all->rank + all->processes - 1) % all->processes;
    if (await(all, other, count)) return NO_ANSWER;
    memcpy(to, all->slots + other * all->room * 4 + place, bytes);
    return DONE;
}
#endif
