/* Copies that need no transport: memcpy of segments, and process_vm_readv/writev between two processes of one host.
   `stop` is looked at between pieces of about a mebibyte, so that a cancelled copy ends within a fraction of a millisecond. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#include "copy.h"

#define NX_PIECE (1 << 20)
#define NX_IOV 512

static int nx_stopped(const int32_t *stop) { return stop && __atomic_load_n(stop, __ATOMIC_RELAXED); }

/* Copies n segments in order; returns the bytes copied, fewer than asked for only when stopped. */
int64_t nx_copy_segments(const int64_t *dst, const int64_t *src, const int64_t *lengths, int64_t n, const int32_t *stop) {
    int64_t done = 0, since = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = 0;
        while (at < lengths[i]) {
            int64_t piece = lengths[i] - at < NX_PIECE ? lengths[i] - at : NX_PIECE;
            memmove((char *)(uintptr_t)dst[i] + at, (const char *)(uintptr_t)src[i] + at, (size_t)piece);
            at += piece;
            done += piece;
            since += piece;
            if (since >= NX_PIECE) {
                if (nx_stopped(stop))
                    return done;
                since = 0;
            }
        }
    }
    return done;
}

/* Where a copy goes on: the segment, and how much of it is copied. */
typedef struct {
    int64_t i, at;
} nx_segment_place;

/* Copies `limit` bytes from `place` on, or all that is left, and moves the place. */
static int nx_copy_some(int pid, int put, const int64_t *local, const int64_t *remote, const int64_t *lengths, int64_t n,
                        nx_segment_place *place, int64_t limit, const int32_t *stop) {
    struct iovec ours[NX_IOV], theirs[NX_IOV];
    int64_t i = place->i, at = place->at;
    while (i < n && limit > 0) {
        int64_t j = i, offset = at, bytes = 0, room = limit < NX_PIECE ? limit : NX_PIECE;
        int n_ours = 0, n_theirs = 0;
        /* Fill one call: up to NX_IOV entries and about NX_PIECE bytes; neighbours on one side share an entry. */
        while (j < n && n_ours < NX_IOV && n_theirs < NX_IOV && bytes < room) {
            int64_t piece = lengths[j] - offset;
            if (piece > room - bytes)
                piece = room - bytes;
            char *a = (char *)(uintptr_t)local[j] + offset, *b = (char *)(uintptr_t)remote[j] + offset;
            if (n_ours && (char *)ours[n_ours - 1].iov_base + ours[n_ours - 1].iov_len == a)
                ours[n_ours - 1].iov_len += (size_t)piece;
            else
                ours[n_ours++] = (struct iovec){a, (size_t)piece};
            if (n_theirs && (char *)theirs[n_theirs - 1].iov_base + theirs[n_theirs - 1].iov_len == b)
                theirs[n_theirs - 1].iov_len += (size_t)piece;
            else
                theirs[n_theirs++] = (struct iovec){b, (size_t)piece};
            bytes += piece;
            offset += piece;
            if (offset == lengths[j]) {
                j++;
                offset = 0;
            }
        }
        if (bytes == 0) {
            i = j;
            at = offset;
            continue;
        }
        ssize_t moved = put ? process_vm_writev(pid, ours, (unsigned long)n_ours, theirs, (unsigned long)n_theirs, 0)
                            : process_vm_readv(pid, ours, (unsigned long)n_ours, theirs, (unsigned long)n_theirs, 0);
        if (moved < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (moved == 0)
            return -EFAULT;
        limit -= moved;
        if (moved == bytes) {
            i = j;
            at = offset;
        } else {
            /* A partial copy ends at the first address that faults, or at a signal: find the place and go on from there. */
            at += moved;
            while (i < n && at >= lengths[i]) {
                at -= lengths[i];
                i++;
            }
        }
        if (i < n && nx_stopped(stop))
            return -ECANCELED;
    }
    *place = (nx_segment_place){i, at};
    return 0;
}

static int nx_copy_between(int pid, int put, const int64_t *local, const int64_t *remote, const int64_t *lengths, int64_t n,
                           const int32_t *stop) {
    nx_segment_place begin = {0, 0};
    return nx_copy_some(pid, put, local, remote, lengths, n, &begin, INT64_MAX, stop);
}

/* Copies n segments from our memory to the other process (put) or the other way round. Returns 0, -ECANCELED when stopped,
   or -errno; *spent_ns: how long it took. */
int nx_process_vm(int pid, int put, const int64_t *local, const int64_t *remote, const int64_t *lengths, int64_t n,
                  const int32_t *stop, int64_t *spent_ns) {
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    int status = nx_copy_between(pid, put, local, remote, lengths, n, stop);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    *spent_ns = (ended.tv_sec - began.tv_sec) * 1000000000ll + ended.tv_nsec - began.tv_nsec;
    return status;
}
