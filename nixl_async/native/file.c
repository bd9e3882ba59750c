/* Files. Segments that lie one behind the other in a file become one request with an iovec for each; requests go out together,
   one io_uring_enter for as many as there is room for. What is in the page cache is read by preadv2(RWF_NOWAIT) and never sees the
   ring; buffered writes are copies into the page cache and are made at once. Direct I/O of memory or offsets that are not aligned
   goes through bounce buffers; the odd edges of a write go through the page cache, in whole pages of their own, so that no page is
   ever written both ways at once, and no file gets longer than what was written to it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
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

#include "file.h"

#define NX_SLOTS 64
#define NX_RUN_IOV 256
#define NX_RUN_NBYTES (1 << 20)
#define NX_BOUNCE_NBYTES (256 << 10)
#define NX_PAGE 4096
#define NX_TMPFS 0x01021994
#define NX_RAMFS 0x858458f6
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

/* One request. iov is the caller's memory; when bounced, the bytes go through `bounce`, of which `skip` bytes come before ours. */
typedef struct {
    int fd, buffered_fd, busy, niov, bounced, put;
    int64_t offset, nbytes, done, skip, useful, segment, bounce_align;
    char *bounce;
    struct iovec one;
    struct iovec iov[NX_RUN_IOV];
} nx_slot;

struct nx_ring {
    int fd;
    unsigned depth;
    int in_flight, cancels; /* Requests and cancellations whose completions have not been seen. */
    unsigned *sq_head, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    void *sqes, *cqes, *sq_map, *cq_map;
    size_t sq_len, cq_len, sqe_len;
    nx_slot slots[NX_SLOTS];
};

#ifdef NX_HAS_URING
nx_ring *nx_ring_open(unsigned int depth, int *error) {
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    if (depth > NX_SLOTS)
        depth = NX_SLOTS;
    /* Twice: a request and its cancellation for each slot. The completion queue is twice that and so never overflows. */
    unsigned entries = depth * 2;
    /* SINGLE_ISSUER and DEFER_TASKRUN, Linux 6.1: completions wake the thread once there are as many as it waits for. */
    p.flags = (1u << 12) | (1u << 13);
    int fd = (int)syscall(__NR_io_uring_setup, entries, &p);
    if (fd < 0 && errno == EINVAL) {
        memset(&p, 0, sizeof p);
        fd = (int)syscall(__NR_io_uring_setup, entries, &p);
    }
    if (fd < 0) {
        *error = errno;
        return NULL;
    }
    /* A seccomp filter may allow the one call and not the other. */
    if (syscall(__NR_io_uring_enter, fd, 0, 0, 0, NULL, 0) < 0) {
        *error = errno;
        close(fd);
        return NULL;
    }
    nx_ring *ring = calloc(1, sizeof *ring);
    if (!ring || !(p.features & (1u << 8)) || !(p.features & 1u)) { /* EXT_ARG, SINGLE_MMAP: Linux 5.11 */
        *error = ring ? ENOSYS : ENOMEM;
        free(ring);
        close(fd);
        return NULL;
    }
    ring->fd = fd;
    ring->depth = depth;
    size_t sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    ring->sq_len = sq > cq ? sq : cq;
    ring->sqe_len = p.sq_entries * sizeof(struct io_uring_sqe);
    ring->sq_map = mmap(NULL, ring->sq_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
    ring->sqes = mmap(NULL, ring->sqe_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
    if (ring->sq_map == MAP_FAILED || ring->sqes == MAP_FAILED) {
        *error = errno;
        if (ring->sq_map != MAP_FAILED)
            munmap(ring->sq_map, ring->sq_len);
        if (ring->sqes != MAP_FAILED)
            munmap(ring->sqes, ring->sqe_len);
        close(fd);
        free(ring);
        return NULL;
    }
    char *base = ring->sq_map;
    ring->sq_head = (unsigned *)(base + p.sq_off.head);
    ring->sq_tail = (unsigned *)(base + p.sq_off.tail);
    ring->sq_mask = (unsigned *)(base + p.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(base + p.sq_off.array);
    ring->cq_head = (unsigned *)(base + p.cq_off.head);
    ring->cq_tail = (unsigned *)(base + p.cq_off.tail);
    ring->cq_mask = (unsigned *)(base + p.cq_off.ring_mask);
    ring->cqes = base + p.cq_off.cqes;
    return ring;
}

void nx_ring_close(nx_ring *ring) {
    if (!ring)
        return;
    munmap(ring->sqes, ring->sqe_len);
    munmap(ring->sq_map, ring->sq_len);
    close(ring->fd);
    for (int i = 0; i < NX_SLOTS; i++)
        free(ring->slots[i].bounce);
    free(ring);
}

static struct io_uring_sqe *nx_next_sqe(nx_ring *ring) {
    unsigned tail = *ring->sq_tail, at = tail & *ring->sq_mask;
    struct io_uring_sqe *sqe = (struct io_uring_sqe *)ring->sqes + at;
    memset(sqe, 0, sizeof *sqe);
    ring->sq_array[at] = at;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    return sqe;
}

static void nx_send(nx_ring *ring, int number) {
    nx_slot *slot = &ring->slots[number];
    struct io_uring_sqe *sqe = nx_next_sqe(ring);
    sqe->opcode = slot->put ? IORING_OP_WRITEV : IORING_OP_READV;
    sqe->fd = slot->fd;
    sqe->off = (uint64_t)(slot->offset + slot->done);
    sqe->addr = (uint64_t)(uintptr_t)(slot->bounced ? &slot->one : slot->iov);
    sqe->len = slot->bounced ? 1 : (unsigned)slot->niov;
    sqe->user_data = (uint64_t)number + 1;
    ring->in_flight++;
    slot->busy = 1;
}

static void nx_ask_cancel(nx_ring *ring, int number) {
    struct io_uring_sqe *sqe = nx_next_sqe(ring);
    sqe->opcode = IORING_OP_ASYNC_CANCEL;
    sqe->addr = (uint64_t)number + 1;
    ring->cancels++;
}

/* Submits all and waits for `wait` completions, five milliseconds at most: so often `stop` is looked at. */
static int nx_enter(nx_ring *ring, int wait) {
    struct __kernel_timespec ts = {0, 5000000};
    struct io_uring_getevents_arg arg;
    memset(&arg, 0, sizeof arg);
    arg.ts = (uint64_t)(uintptr_t)&ts;
    /* What was taken before a wait timed out is told by the kernel's head only. */
    unsigned ready = *ring->sq_tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
    if (syscall(__NR_io_uring_enter, ring->fd, ready, wait, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof arg) >= 0)
        return 0;
    if (errno == ETIME || errno == EINTR)
        return 0;
    int error = errno;
    struct timespec pause = {0, 200000}; /* Not in a tight loop while the kernel has no memory for requests. */
    nanosleep(&pause, NULL);
    return error == EAGAIN || error == EBUSY ? 0 : -error;
}

/* Takes back what the kernel has not taken, after an error of io_uring_enter. */
static void nx_retract(nx_ring *ring) {
    unsigned head = __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE), tail = *ring->sq_tail;
    for (; tail != head; tail--) {
        struct io_uring_sqe *sqe = (struct io_uring_sqe *)ring->sqes + ((tail - 1) & *ring->sq_mask);
        if (sqe->user_data) {
            ring->slots[sqe->user_data - 1].busy = 0;
            ring->in_flight--;
        } else
            ring->cancels--;
    }
    __atomic_store_n(ring->sq_tail, head, __ATOMIC_RELEASE);
}

/* Takes one completion; *number is -1 for that of a cancellation. */
static int nx_reap(nx_ring *ring, int *number, int *result) {
    unsigned head = *ring->cq_head;
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return 0;
    struct io_uring_cqe *cqe = (struct io_uring_cqe *)ring->cqes + (head & *ring->cq_mask);
    *number = (int)cqe->user_data - 1;
    *result = cqe->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    if (*number < 0)
        ring->cancels--;
    else {
        ring->slots[*number].busy = 0;
        ring->in_flight--;
    }
    return 1;
}
#else
nx_ring *nx_ring_open(unsigned int depth, int *error) {
    (void)depth;
    *error = ENOSYS;
    return NULL;
}
void nx_ring_close(nx_ring *ring) { (void)ring; }
static void nx_send(nx_ring *ring, int number) { (void)ring, (void)number; }
static void nx_ask_cancel(nx_ring *ring, int number) { (void)ring, (void)number; }
static int nx_enter(nx_ring *ring, int wait) { (void)ring, (void)wait; return -ENOSYS; }
static void nx_retract(nx_ring *ring) { (void)ring; }
static int nx_reap(nx_ring *ring, int *number, int *result) { (void)ring, (void)number, (void)result; return 0; }
#endif

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

/* Where a walk over the segments stands. */
typedef struct {
    int64_t i, at;
} nx_cursor;

/* Fills the slot with the next run from the cursor on, at most a megabyte; moves the cursor. Returns the run's bytes. */
static int64_t nx_next_run(nx_slot *slot, nx_cursor *cursor, int put, const int32_t *fds, const int32_t *direct,
                           const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n) {
    const int64_t limit = NX_RUN_NBYTES;
    while (cursor->i < n && cursor->at == lengths[cursor->i]) {
        cursor->i++;
        cursor->at = 0;
    }
    if (cursor->i == n)
        return 0;
    int64_t i = cursor->i, at = cursor->at;
    slot->put = put;
    slot->segment = i;
    slot->buffered_fd = fds[i];
    slot->fd = direct[i] >= 0 ? direct[i] : fds[i];
    slot->offset = offsets[i] + at;
    slot->nbytes = slot->done = slot->skip = 0;
    slot->niov = slot->bounced = 0;
    while (i < n && slot->nbytes < limit && fds[i] == slot->buffered_fd && offsets[i] + at == slot->offset + slot->nbytes) {
        int64_t piece = lengths[i] - at;
        if (piece > limit - slot->nbytes)
            piece = limit - slot->nbytes;
        char *memory = (char *)(uintptr_t)addresses[i] + at;
        struct iovec *last = slot->niov ? &slot->iov[slot->niov - 1] : NULL;
        if (piece) {
            if (last && (char *)last->iov_base + last->iov_len == memory)
                last->iov_len += (size_t)piece;
            else if (slot->niov < NX_RUN_IOV)
                slot->iov[slot->niov++] = (struct iovec){memory, (size_t)piece};
            else
                break;
        }
        slot->nbytes += piece;
        at += piece;
        if (at == lengths[i]) {
            i++;
            at = 0;
        }
    }
    cursor->i = i;
    cursor->at = at;
    slot->useful = slot->nbytes;
    return slot->nbytes;
}

static void nx_scatter(nx_slot *slot, char *bytes, int gather) {
    for (int i = 0; i < slot->niov; i++) {
        if (gather)
            memcpy(bytes, slot->iov[i].iov_base, slot->iov[i].iov_len);
        else
            memcpy(slot->iov[i].iov_base, bytes, slot->iov[i].iov_len);
        bytes += slot->iov[i].iov_len;
    }
}

/* Forgets the first nbytes of the slot's iovecs. */
static void nx_advance(nx_slot *slot, int64_t nbytes) {
    int first = 0;
    while (first < slot->niov && (int64_t)slot->iov[first].iov_len <= nbytes)
        nbytes -= (int64_t)slot->iov[first++].iov_len;
    if (first) {
        memmove(slot->iov, slot->iov + first, (size_t)(slot->niov - first) * sizeof(struct iovec));
        slot->niov -= first;
    }
    if (slot->niov && nbytes) {
        slot->iov[0].iov_base = (char *)slot->iov[0].iov_base + nbytes;
        slot->iov[0].iov_len -= (size_t)nbytes;
    }
}

/* Moves what is left of the slot by plain system calls on fd; 0, -ENODATA or -errno. */
static int nx_blocking(nx_slot *slot, int fd) {
    while (slot->done < slot->nbytes) {
        ssize_t moved = slot->put ? pwritev(fd, slot->iov, slot->niov, slot->offset + slot->done)
                                  : preadv(fd, slot->iov, slot->niov, slot->offset + slot->done);
        if (moved < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (moved == 0)
            return slot->put ? -ENOSPC : -ENODATA;
        slot->done += moved;
        nx_advance(slot, moved);
    }
    return 0;
}

/* Cuts a slot's iovecs to its first nbytes bytes. */
static void nx_truncate(nx_slot *slot, int64_t nbytes) {
    int64_t left = nbytes;
    int i = 0;
    for (; i < slot->niov && left > 0; i++) {
        if ((int64_t)slot->iov[i].iov_len > left)
            slot->iov[i].iov_len = (size_t)left;
        left -= (int64_t)slot->iov[i].iov_len;
    }
    slot->niov = i;
    slot->nbytes = slot->useful = nbytes;
}

static int nx_make_bounce(nx_slot *slot, int64_t align) {
    if (slot->bounce_align < align) {
        free(slot->bounce);
        slot->bounce = NULL;
        slot->bounce_align = 0;
        void *memory = NULL;
        if (posix_memalign(&memory, (size_t)align, NX_BOUNCE_NBYTES))
            return -ENOMEM;
        slot->bounce = memory;
        slot->bounce_align = align;
    }
    return 0;
}

/* Makes a run fit for direct I/O: leaves it alone, sends it through the bounce buffer, or writes an odd edge at once. The cursor
   goes back to where the run ends if it is cut. Returns 1 to send it, 0 if it is done, -errno. */
static int nx_make_direct(nx_slot *slot, nx_cursor *cursor, const int64_t *offsets, const int64_t *lengths,
                          int64_t memory_align, int64_t align) {
    int64_t mask = align - 1, want = slot->nbytes;
    int fits = !(slot->offset & mask);
    for (int i = 0; fits && i < slot->niov; i++)
        fits = !((uintptr_t)slot->iov[i].iov_base & (uintptr_t)(memory_align - 1)) &&
               (!((int64_t)slot->iov[i].iov_len & mask) || i == slot->niov - 1);
    if (fits && !(slot->nbytes & mask))
        return 1;
    int edge = 0;
    if (fits && slot->nbytes > align)
        want = slot->nbytes & ~mask;
    else if (slot->put && (slot->offset & mask)) {
        int64_t head = align - (slot->offset & mask);
        want = head < slot->nbytes ? head : slot->nbytes;
        edge = 1;
    } else if (slot->put && slot->nbytes < align)
        edge = 1;
    else {
        if (want > NX_BOUNCE_NBYTES - (slot->offset & mask))
            want = NX_BOUNCE_NBYTES - (slot->offset & mask);
        if (slot->put)
            want &= ~mask;
    }
    if (want < slot->nbytes) {
        nx_truncate(slot, want);
        *cursor = (nx_cursor){slot->segment, slot->offset - offsets[slot->segment]};
        int64_t left = want;
        while (left >= lengths[cursor->i] - cursor->at) {
            left -= lengths[cursor->i] - cursor->at;
            cursor->i++;
            cursor->at = 0;
            if (!left)
                break;
        }
        cursor->at += left;
    }
    if (edge)
        return nx_blocking(slot, slot->buffered_fd);
    if (fits && !(slot->nbytes & mask))
        return 1;
    int error = nx_make_bounce(slot, align > memory_align ? align : memory_align);
    if (error)
        return error;
    slot->bounced = 1;
    slot->skip = slot->offset & mask;
    slot->offset -= slot->skip;
    slot->nbytes = (slot->skip + slot->useful + mask) & ~mask;
    if (slot->put)
        nx_scatter(slot, slot->bounce, 1);
    slot->one = (struct iovec){slot->bounce, (size_t)slot->nbytes};
    return 1;
}

/* Moves what is left of a direct request through the page cache: it is no longer aligned, or never was enough. */
static int nx_finish_buffered(nx_slot *slot) {
    if (!slot->bounced) {
        int error = nx_blocking(slot, slot->buffered_fd);
        return error ? error : 1;
    }
    int64_t end = slot->skip + slot->useful;
    while (slot->done < end) {
        char *at = slot->bounce + slot->done;
        size_t left = (size_t)(end - slot->done);
        ssize_t moved = slot->put ? pwrite(slot->buffered_fd, at, left, slot->offset + slot->done)
                                  : pread(slot->buffered_fd, at, left, slot->offset + slot->done);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return moved < 0 ? -errno : slot->put ? -ENOSPC : -ENODATA;
        slot->done += moved;
    }
    return 1;
}

/* Takes note of `moved` bytes of a request. Returns 1 when it is complete, 0 when the rest must be sent, -errno. */
static int nx_moved(nx_slot *slot, int64_t moved) {
    int direct = slot->fd != slot->buffered_fd, state = 1;
    if (moved == -EINTR || moved == -EAGAIN)
        return 0;
    if (moved < 0 && !(direct && moved == -EINVAL))
        return (int)moved;
    if (moved == 0)
        return slot->put ? -ENOSPC : -ENODATA;
    if (moved > 0) {
        slot->done += moved;
        if (!slot->bounced)
            nx_advance(slot, moved);
    }
    if (slot->done < slot->skip + slot->useful) {
        /* Direct: the end of the file, or of the space; or its file system needs more than it says. */
        if (!direct)
            return 0;
        state = nx_finish_buffered(slot);
    }
    if (state == 1 && slot->bounced && !slot->put)
        nx_scatter(slot, slot->bounce + slot->skip, 0);
    return state;
}

static int nx_send_blocking(nx_slot *slot) {
    for (;;) {
        struct iovec *iov = slot->bounced ? &slot->one : slot->iov;
        int niov = slot->bounced ? 1 : slot->niov;
        ssize_t moved = slot->put ? pwritev(slot->fd, iov, niov, slot->offset + slot->done)
                                  : preadv(slot->fd, iov, niov, slot->offset + slot->done);
        int state = nx_moved(slot, moved < 0 ? -errno : moved);
        if (state)
            return state < 0 ? state : 0;
    }
}

/* Whether the file's bytes are in memory though its file system does not know RWF_NOWAIT. */
static int nx_in_memory(int fd) {
    struct statfs st;
    return fstatfs(fd, &st) == 0 && ((unsigned)st.f_type == NX_TMPFS || (unsigned)st.f_type == NX_RAMFS);
}

/* Reads what the page cache has of the slot. Returns 0 when that was all, 1 when the rest must be sent, -errno. */
static int nx_read_cached(nx_slot *slot) {
    ssize_t moved = preadv2(slot->fd, slot->iov, slot->niov, slot->offset, RWF_NOWAIT);
    if (moved < 0)
        return errno == EOPNOTSUPP && nx_in_memory(slot->fd) ? nx_blocking(slot, slot->fd) : 1;
    slot->done = moved;
    nx_advance(slot, moved);
    return slot->done < slot->nbytes;
}

int nx_file_run(nx_ring *ring, int put, const int32_t *fds, const int32_t *direct_fds, const int64_t *offsets,
                const int64_t *addresses, const int64_t *lengths, int64_t n, int64_t memory_align, int64_t offset_align,
                const int32_t *stop, int64_t *failed) {
    nx_cursor cursor = {0, 0};
    nx_slot *own = NULL;
    int error = 0, asked = 0, more = 1;
    /* A file system that wants more than the bounce buffers have is read and written through the page cache. */
    int direct = offset_align <= NX_BOUNCE_NBYTES && memory_align <= NX_BOUNCE_NBYTES;
    *failed = 0;
    if (!ring) {
        own = calloc(1, sizeof *own);
        if (!own)
            return -ENOMEM;
    }
    while (more || (ring && (ring->in_flight || ring->cancels))) {
        if (!error && __atomic_load_n(stop, __ATOMIC_RELAXED))
            error = -ECANCELED;
        if (error)
            more = 0;
        /* Fill what is free. */
        for (int number = 0; more && number < (ring ? (int)ring->depth : 1); number++) {
            nx_slot *slot = ring ? &ring->slots[number] : own;
            if (slot->busy)
                continue;
            int state = 0;
            while (more && state == 0) {
                if (!nx_next_run(slot, &cursor, put, fds, direct ? direct_fds : fds, offsets, addresses, lengths, n)) {
                    more = 0;
                    break;
                }
                if (slot->fd != slot->buffered_fd)
                    state = nx_make_direct(slot, &cursor, offsets, lengths, memory_align, offset_align);
                else if (put || !ring)
                    state = nx_blocking(slot, slot->fd);
                else
                    state = nx_read_cached(slot);
                if (state == 1 && !ring)
                    state = nx_send_blocking(slot);
                if (state < 0) {
                    error = state;
                    *failed = slot->segment;
                    more = 0;
                } else if (state == 1)
                    nx_send(ring, number);
                else if (__atomic_load_n(stop, __ATOMIC_RELAXED)) {
                    error = -ECANCELED;
                    more = 0;
                }
            }
        }
        if (!ring || !(ring->in_flight || ring->cancels))
            continue;
        if (error && !asked) {
            asked = 1;
            for (int number = 0; number < (int)ring->depth; number++)
                if (ring->slots[number].busy)
                    nx_ask_cancel(ring, number);
        }
        /* While there is more to send, a quarter: each wake-up sends as many. Else all there are; short ones are few. */
        int wait = more ? (ring->in_flight + 3) / 4 : ring->in_flight + ring->cancels;
        int entered = nx_enter(ring, wait);
        if (entered < 0) {
            error = error ? error : entered;
            nx_retract(ring);
        }
        int number, result;
        while (nx_reap(ring, &number, &result)) {
            if (number < 0 || error)
                continue;
            nx_slot *slot = &ring->slots[number];
            int state = nx_moved(slot, result);
            if (state == 0) {
                if (slot->bounced)
                    slot->one = (struct iovec){slot->bounce + slot->done, (size_t)(slot->nbytes - slot->done)};
                nx_send(ring, number);
            } else if (state < 0) {
                error = state;
                *failed = slot->segment;
            }
        }
    }
    if (own) {
        free(own->bounce);
        free(own);
    }
    return error;
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
