/* Copies between this process and another that are made again and again, with all that one needs in one place; large ones by the
   caller and a second thread, piece by piece. That thread looks for work for a while after the last, and then sleeps. It is woken
   where copies come close upon each other, and takes part from when it is awake. Who runs out of pieces waits for the other's last.
   Two threads of one core, which share its caches and what it copies with, may be no faster than one: that is found out by trying. */
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "copy.h"
#include "vm.h"

/* From here on two copy together: less is over before the other has seen it. */
#define VM_TOGETHER (128 << 10)
/* A piece: about a quarter of the copy, and so much that the system call does not count. */
#define VM_PIECE_LEAST (64 << 10)
#define VM_PIECE_MOST (256 << 10)
/* How long the second thread looks for work: longer than the time between copies, where that is short. It is woken for a copy that
   comes soon after the last. */
#define VM_SHORT_NS 150000
#define VM_LOOK_NS 250000
#define VM_GLANCE_NS 30000
#define VM_CLOSE_NS 500000
/* A core that others want too: who waited so long for the other's piece copies alone for so many times, twice as many each time. */
#define VM_LATE_NS 100000
#define VM_ALONE_LEAST 64
#define VM_ALONE_MOST (1 << 16)

/* Copies of each size are made this way and that for so many times, and then again each so many copies. */
#define VM_TRY 16
#define VM_TRY_EVERY 1024
/* Sizes from one power of two to the next, from VM_TOGETHER on. */
#define VM_SIZES 8

/* What copies of one size take, in ns for a mebibyte: by the caller alone, and by two. 0: not known. */
typedef struct {
    int64_t ns[2];
    uint32_t n;
} vm_pace;

enum { VM_NONE, VM_OFFERED, VM_JOINED, VM_LEFT };

struct nx_vm_second {
    pthread_t thread;
    uint32_t state, asleep;
    int32_t quit, taken, status;
    const nx_vm_call *call;
    int64_t piece, next;
    int64_t ended_ns, look_ns, joined;
    int32_t alone, alone_next;
    vm_pace paces[2][VM_SIZES];
};

static int64_t vm_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static vm_pace *vm_pace_of(nx_vm_second *self, const nx_vm_call *call) {
    int size = 0;
    for (int64_t nbytes = call->nbytes; nbytes >= 2 * VM_TOGETHER && size < VM_SIZES - 1; nbytes /= 2)
        size++;
    return &self->paces[!!call->put][size];
}

/* Whether two are to make this copy. They take twice the cores' time, which an eighth of the time must be worth. */
static int vm_wants_two(vm_pace *pace) {
    uint32_t n = pace->n++;
    if (n < 2 * VM_TRY)
        return n >= VM_TRY;
    int two = pace->ns[1] && pace->ns[1] < pace->ns[0] - pace->ns[0] / 8;
    return n % VM_TRY_EVERY < VM_TRY ? !two : two;
}

/* Takes in what a copy took; one that was interrupted says little. */
static void vm_learn(int64_t *ns, int64_t spent_ns, int64_t nbytes) {
    int64_t now = spent_ns * (1 << 20) / nbytes + 1;
    if (*ns && now > 2 * *ns)
        now = 2 * *ns;
    *ns = *ns ? *ns + (now - *ns) / 4 : now;
}

/* Copies pieces until there are none left, or one has failed. */
static void vm_pieces(nx_vm_second *self) {
    const nx_vm_call *call = self->call;
    nx_segment_place place = {0, 0};
    int64_t reached = 0;
    while (!__atomic_load_n(&self->status, __ATOMIC_RELAXED)) {
        int64_t begin = __atomic_fetch_add(&self->next, 1, __ATOMIC_RELAXED) * self->piece;
        if (begin >= call->nbytes)
            return;
        for (int64_t skip = begin - reached; skip > 0;) {
            int64_t left = call->lengths[place.i] - place.at;
            if (left > skip) {
                place.at += skip;
                break;
            }
            skip -= left;
            place = (nx_segment_place){place.i + 1, 0};
        }
        int64_t nbytes = call->nbytes - begin < self->piece ? call->nbytes - begin : self->piece;
        int status = nx_copy_some(call->pid, call->put, call->local, call->remote, call->lengths, call->n, &place, nbytes, NULL);
        if (status) {
            __atomic_store_n(&self->status, status, __ATOMIC_RELAXED);
            return;
        }
        reached = begin + nbytes;
    }
}

static void *vm_second_run(void *argument) {
    nx_vm_second *self = argument;
    int64_t since = vm_clock();
    for (;;) {
        uint32_t offered = VM_OFFERED;
        if (__atomic_load_n(&self->state, __ATOMIC_RELAXED) == VM_OFFERED &&
            __atomic_compare_exchange_n(&self->state, &offered, VM_JOINED, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            vm_pieces(self);
            __atomic_store_n(&self->state, VM_LEFT, __ATOMIC_RELEASE);
            since = vm_clock();
        } else if (__atomic_load_n(&self->quit, __ATOMIC_SEQ_CST)) {
            return NULL;
        } else if (vm_clock() - since > __atomic_load_n(&self->look_ns, __ATOMIC_RELAXED)) {
            /* Who offers looks at `asleep` afterwards, as we look at what is offered after having said that we sleep. */
            __atomic_store_n(&self->asleep, 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&self->state, __ATOMIC_SEQ_CST) != VM_OFFERED && !__atomic_load_n(&self->quit, __ATOMIC_SEQ_CST))
                syscall(SYS_futex, &self->asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
            __atomic_store_n(&self->asleep, 0, __ATOMIC_SEQ_CST);
            since = vm_clock();
        } else {
            packed_pause();
        }
    }
}

static void vm_wake(nx_vm_second *self) {
    if (__atomic_load_n(&self->asleep, __ATOMIC_SEQ_CST) && __atomic_exchange_n(&self->asleep, 0, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &self->asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Starts the second thread, which handles no signals. Returns NULL and sets *error where that cannot be. */
nx_vm_second *nx_vm_second_open(int *error) {
    nx_vm_second *self = calloc(1, sizeof *self);
    if (!self) {
        *error = -ENOMEM;
        return NULL;
    }
    self->alone_next = VM_ALONE_LEAST;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&self->thread, NULL, vm_second_run, self);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        free(self);
        *error = -failed;
        return NULL;
    }
    pthread_setname_np(self->thread, "nixl-second");
    return self;
}

/* Ends it, after the call that it takes part in; none may be made with it any more. */
void nx_vm_second_close(nx_vm_second *self) {
    while (__atomic_exchange_n(&self->taken, 1, __ATOMIC_ACQUIRE))
        sched_yield();
    __atomic_store_n(&self->quit, 1, __ATOMIC_SEQ_CST);
    vm_wake(self);
    pthread_join(self->thread, NULL);
    free(self);
}

/* Returns in how many copies it took part. */
int64_t nx_vm_second_joined(nx_vm_second *self) { return __atomic_load_n(&self->joined, __ATOMIC_RELAXED); }

static int vm_together(const nx_vm_call *call, nx_vm_second *self, int64_t now) {
    int64_t piece = ((call->nbytes / 4 + 4095) & ~4095ll);
    self->call = call;
    self->piece = piece < VM_PIECE_LEAST ? VM_PIECE_LEAST : piece > VM_PIECE_MOST ? VM_PIECE_MOST : piece;
    self->next = 0;
    self->status = 0;
    int64_t between = now - self->ended_ns;
    __atomic_store_n(&self->look_ns, between < VM_SHORT_NS ? VM_LOOK_NS : VM_GLANCE_NS, __ATOMIC_RELAXED);
    __atomic_store_n(&self->state, VM_OFFERED, __ATOMIC_SEQ_CST);
    if (between < VM_CLOSE_NS)
        vm_wake(self);
    vm_pieces(self);
    uint32_t offered = VM_OFFERED;
    if (!__atomic_compare_exchange_n(&self->state, &offered, VM_NONE, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        int64_t began = vm_clock(), waited = 0;
        while (__atomic_load_n(&self->state, __ATOMIC_ACQUIRE) != VM_LEFT) {
            waited = vm_clock() - began;
            if (waited > VM_LATE_NS)
                sched_yield();
            else
                packed_pause();
        }
        if (waited > VM_LATE_NS) {
            self->alone = self->alone_next;
            self->alone_next = self->alone_next < VM_ALONE_MOST ? 2 * self->alone_next : VM_ALONE_MOST;
        } else if (self->alone_next > VM_ALONE_LEAST) {
            self->alone_next--;
        }
        __atomic_store_n(&self->joined, self->joined + 1, __ATOMIC_RELAXED);
        __atomic_store_n(&self->state, VM_NONE, __ATOMIC_RELAXED);
    }
    return self->status;
}

/* Returns what `nx_process_vm` does, and -ESRCH when the process has ended: its number may be another's by then. `second` (or NULL)
   takes part in large copies; another thread that copies at this moment has it for itself. */
int nx_vm_now(nx_vm_call *call, nx_vm_second *second) {
    struct pollfd alive = {.fd = call->pidfd, .events = POLLIN};
    if (poll(&alive, 1, 0) > 0)
        return -ESRCH;
    if (!second || call->nbytes < VM_TOGETHER || __atomic_exchange_n(&second->taken, 1, __ATOMIC_ACQUIRE))
        return nx_process_vm(call->pid, call->put, call->local, call->remote, call->lengths, call->n, NULL, &call->spent_ns);
    int64_t began = vm_clock(), joined = second->joined;
    vm_pace *pace = vm_pace_of(second, call);
    int status, two = 0, learns = 1;
    if (second->alone > 0) {
        second->alone--;
        learns = 0;
    } else {
        two = vm_wants_two(pace);
    }
    if (two) {
        status = vm_together(call, second, began);
        learns = second->joined > joined;
    } else {
        status = nx_copy_between(call->pid, call->put, call->local, call->remote, call->lengths, call->n, NULL);
    }
    second->ended_ns = vm_clock();
    call->spent_ns = second->ended_ns - began;
    if (learns && !status)
        vm_learn(&pace->ns[two], call->spent_ns, call->nbytes);
    __atomic_store_n(&second->taken, 0, __ATOMIC_RELEASE);
    return status;
}
