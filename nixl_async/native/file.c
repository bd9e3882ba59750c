/* Files. Segments are sorted by their places; those that lie one behind the other in a file become one request with an iovec for
   each; requests go out together, one io_uring_enter for as many as there is room for. What is in the page cache is read by
   preadv2(RWF_NOWAIT) and never sees the ring; buffered writes are copies into the page cache and are made at once. Several threads
   may work on the same list: each takes the next run when it has room for one. Direct I/O of memory or offsets that are not aligned
   goes through bounce buffers; the odd edges of a write go through the page cache, in whole pages of their own, so that no page is
   ever written both ways at once, and no file gets longer than what was written to it. `file_slot.c` has one request, `file_ring.c`
   the io_uring, `file_lanes.c` the threads. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>
#if defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#define NX_HAS_URING 1
#endif
#endif

#include "checksum.h"
#include "copy.h"
#include "file.h"

#define NX_SLOTS 64
#define NX_RUN_IOV 1024
/* A write through the page cache takes the file's lock and begins a journal entry each time: few and long ones. */
#define NX_WRITE_NBYTES (4 << 20)
#define NX_READ_NBYTES (1 << 20)
#define NX_DIRECT_NBYTES (1 << 20)
#define NX_LEAST_NBYTES (128 << 10)
#define NX_SORTED_DIRECT_NBYTES (256 << 10)
#define NX_EAGER 4
#define NX_BOUNCE_NBYTES (256 << 10)
#define NX_PAGE 4096
#define NX_COPY_NBYTES (1 << 20)
#define NX_TMPFS 0x01021994
#define NX_RAMFS 0x858458f6
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif


#include "file_slot.c"
#include "file_ring.c"

void nx_file_align(int fd, int64_t *memory, int64_t *offset) {
    /* struct statx of linux/stat.h; STATX_DIOALIGN (Linux 6.1) is newer than many systems' headers. */
    struct {
        uint32_t mask, rest[37];
        uint32_t mem_align, offset_align;
        uint32_t more[64];
    } st;
    memset(&st, 0, sizeof st);
    *memory = *offset = NX_PAGE;
#ifdef SYS_statx
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, 0x2000u, &st) == 0 && (st.mask & 0x2000u) && st.mem_align && st.offset_align) {
        *memory = st.mem_align;
        /* Never less than a page, so that odd edges are whole pages of the page cache. */
        if (st.offset_align > NX_PAGE)
            *offset = st.offset_align;
    }
#endif
}


static void nx_fail(nx_work *work, int error, int64_t segment) {
    pthread_mutex_lock(&work->lock);
    if (!work->error) {
        work->failed = work->order ? work->order[segment] : segment;
        __atomic_store_n(&work->error, error, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&work->lock);
}

static int nx_ended(nx_work *work) {
    if (__atomic_load_n(work->stop, __ATOMIC_RELAXED))
        nx_fail(work, -ECANCELED, 0);
    return __atomic_load_n(&work->error, __ATOMIC_RELAXED) != 0;
}

/* Takes the next run and does what can be done at once. Returns 1 when it must be sent; 0 when nothing is left to take. */
static int nx_take(nx_work *work, nx_slot *slot, nx_ring *ring) {
    while (!nx_ended(work)) {
        pthread_mutex_lock(&work->lock);
        if (!work->sorted)
            nx_sort(work);
        if (!nx_next_run(work, slot)) {
            pthread_mutex_unlock(&work->lock);
            return 0;
        }
        int direct = slot->fd != slot->buffered_fd, way = direct ? nx_plan_direct(work, slot) : NX_STRAIGHT, state = 1;
        work->left -= slot->useful;
        pthread_mutex_unlock(&work->lock);
        if (way == NX_EDGE)
            state = nx_blocking(slot, slot->buffered_fd);
        else if (way == NX_BOUNCED)
            state = (state = nx_bounce(work, slot)) ? state : 1;
        else if (!direct)
            state = work->put || !ring ? nx_blocking(slot, slot->fd) : nx_read_cached(slot);
        if (state == 1 && !ring)
            state = nx_send_blocking(slot);
        if (state == 1)
            return 1;
        if (state < 0)
            nx_fail(work, state, slot->segment);
    }
    return 0;
}

/* Works on what is left until nothing is, or somebody failed or stopped it. Without a ring, `own` is the one slot. */
static void nx_work_on(nx_work *work, nx_ring *ring, nx_slot *own) {
    if (!ring) {
        nx_take(work, own, NULL);
        return;
    }
    int more = 1, asked = 0, eager = 1;
    while (more || ring->in_flight || ring->cancels) {
        int sent = 0, entered = 0;
        for (int number = 0; more && number < (int)ring->depth; number++) {
            if (ring->slots[number].busy)
                continue;
            if (!nx_take(work, &ring->slots[number], ring)) {
                more = 0;
                break;
            }
            nx_send(ring, number);
            /* The device begins while the rest of its queue is still being filled. */
            if (eager && ++sent % NX_EAGER == 0 && (entered = nx_enter(ring, 0)) < 0)
                break;
        }
        eager = 0;
        if (!ring->in_flight && !ring->cancels)
            continue;
        if (nx_ended(work)) {
            more = 0;
            for (int number = 0; !asked && number < (int)ring->depth; number++)
                if (ring->slots[number].busy)
                    nx_ask_cancel(ring, number);
            asked = 1;
        }
        /* While there is more to send, an eighth: each wake-up sends as many. Else all there are; short ones are few. */
        if (entered == 0)
            entered = nx_enter(ring, more ? (ring->in_flight + 7) / 8 : ring->in_flight + ring->cancels);
        if (entered < 0) {
            nx_fail(work, entered, 0);
            nx_retract(ring);
        }
        int number, result;
        while (nx_reap(ring, &number, &result)) {
            if (number < 0 || __atomic_load_n(&work->error, __ATOMIC_RELAXED))
                continue;
            nx_slot *slot = &ring->slots[number];
            int state = nx_moved(slot, result);
            if (state == 0) {
                if (slot->bounced)
                    slot->one = (struct iovec){slot->bounce + slot->done, (size_t)(slot->nbytes - slot->done)};
                nx_send(ring, number);
            } else if (state < 0)
                nx_fail(work, state, slot->segment);
        }
    }
}

static void nx_work_init(nx_work *work, int put, const int32_t *fds, const int32_t *direct_fds, const int64_t *offsets,
                         const int64_t *addresses, const int64_t *lengths, int64_t n, int64_t memory_align,
                         int64_t offset_align, const int32_t *stop) {
    /* A file system that wants more than the bounce buffers have is read and written through the page cache. */
    int direct = offset_align <= NX_BOUNCE_NBYTES && memory_align <= NX_BOUNCE_NBYTES;
    *work = (nx_work){.fds = fds, .direct_fds = direct ? direct_fds : fds, .stop = stop, .offsets = offsets};
    work->addresses = addresses;
    work->lengths = lengths;
    work->n = n;
    work->memory_align = memory_align;
    work->offset_align = offset_align;
    work->put = put;
    work->ways = 1;
    pthread_mutex_init(&work->lock, NULL);
}

static void nx_work_end(nx_work *work) {
    free(work->order);
    pthread_mutex_destroy(&work->lock);
}

static nx_slot *nx_new_slot(void) { return calloc(1, sizeof(nx_slot)); }

static void nx_free_slot(nx_slot *slot) {
    if (slot)
        free(slot->bounce);
    free(slot);
}

int nx_file_run(nx_ring *ring, int put, const int32_t *fds, const int32_t *direct_fds, const int64_t *offsets,
                const int64_t *addresses, const int64_t *lengths, int64_t n, int64_t memory_align, int64_t offset_align,
                const int32_t *stop, int64_t *failed) {
    nx_slot *own = ring ? NULL : nx_new_slot();
    if (!ring && !own)
        return -ENOMEM;
    nx_work work;
    nx_work_init(&work, put, fds, direct_fds, offsets, addresses, lengths, n, memory_align, offset_align, stop);
    nx_work_on(&work, ring, own);
    nx_free_slot(own);
    nx_work_end(&work);
    *failed = work.failed;
    return work.error;
}

int nx_file_cached(int fd, const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n) {
    int flags = RWF_NOWAIT;
    for (int64_t i = 0; i < n; i++) {
        struct iovec iov = {(void *)(uintptr_t)addresses[i], (size_t)lengths[i]};
        ssize_t moved = lengths[i] ? preadv2(fd, &iov, 1, offsets[i], flags) : 0;
        if (moved < 0 && errno == EOPNOTSUPP && flags && nx_in_memory(fd)) {
            flags = 0;
            i--;
        } else if (moved != (ssize_t)lengths[i])
            return 0;
    }
    return 1;
}

#include "file_lanes.c"
