/* One request: the next run of segments, made fit for direct I/O, moved by plain calls, taken note of. Part of the unit file.c. */
/* One request. iov is the caller's memory; when bounced, the bytes go through `bounce`, of which `skip` bytes come before ours. */
typedef struct {
    int fd, buffered_fd, busy, niov, bounced, put;
    int64_t offset, nbytes, done, skip, useful, segment, bounce_align;
    char *bounce;
    struct iovec one;
    struct iovec iov[NX_RUN_IOV];
} nx_slot;

/* How a run is moved. */
enum { NX_STRAIGHT, NX_BOUNCED, NX_EDGE };

/* Where a walk over the segments stands. */
typedef struct {
    int64_t i, at;
} nx_cursor;

/* What is to be moved, shared by the threads that work on it. `left` bytes are not taken yet; where one thread works alone nobody
   counts them. */
typedef struct {
    const int32_t *fds, *direct_fds, *stop;
    const int64_t *offsets, *addresses, *lengths;
    int64_t n, memory_align, offset_align, left, failed;
    int put, ways, error, sorted;
    pthread_mutex_t lock; /* Of cursor, left, failed, and of sorting; error is also read without it. */
    nx_cursor cursor;
    int64_t *order; /* Where the caller has what is segment i here; NULL when the caller's order is the files'. */
} nx_work;

typedef struct {
    int64_t offset, index;
    int32_t fd;
} nx_place;

static int nx_by_place(const void *left, const void *right) {
    const nx_place *a = left, *b = right;
    if (a->fd != b->fd)
        return a->fd < b->fd ? -1 : 1;
    return a->offset < b->offset ? -1 : a->offset > b->offset;
}

/* Brings the segments into the files' order: what lies together in a file is moved together, in whatever order it was asked for. If
   there is no memory for that, or nothing to gain, they stay as they are. */
static void nx_sort(nx_work *work) {
    int64_t n = work->n, sorted = 1;
    const int32_t *fds = work->fds;
    const int64_t *offsets = work->offsets;
    work->sorted = 1;
    while (sorted < n && fds[sorted] >= fds[sorted - 1] &&
           (fds[sorted] != fds[sorted - 1] || offsets[sorted] >= offsets[sorted - 1]))
        sorted++;
    if (sorted >= n)
        return;
    int64_t nbytes = 0;
    for (int64_t i = 0; i < n; i++)
        nbytes += work->lengths[i];
    /* Devices serve long requests from all over the file at least as fast as neighbours. */
    if (work->direct_fds[0] >= 0 && work->direct_fds != fds && nbytes / n >= NX_SORTED_DIRECT_NBYTES)
        return;
    nx_place *places = malloc((size_t)n * sizeof *places);
    int64_t *order = malloc((size_t)n * (4 * sizeof(int64_t) + 2 * sizeof(int32_t)));
    if (!places || !order) {
        free(places);
        free(order);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        places[i] = (nx_place){offsets[i], i, fds[i]};
    qsort(places, (size_t)n, sizeof *places, nx_by_place);
    int64_t *to_offsets = order + n, *addresses = order + 2 * n, *lengths = order + 3 * n;
    int32_t *to_fds = (int32_t *)(order + 4 * n), *direct_fds = to_fds + n;
    for (int64_t i = 0; i < n; i++) {
        int64_t from = order[i] = places[i].index;
        to_offsets[i] = places[i].offset;
        to_fds[i] = places[i].fd;
        addresses[i] = work->addresses[from];
        lengths[i] = work->lengths[from];
        direct_fds[i] = work->direct_fds[from];
    }
    free(places);
    work->order = order;
    work->fds = to_fds;
    work->direct_fds = direct_fds;
    work->offsets = to_offsets;
    work->addresses = addresses;
    work->lengths = lengths;
}

/* How long the next run may be. Copies by several threads are cut so that all of them end at about the same time. */
static int64_t nx_run_limit(const nx_work *work, int direct) {
    if (direct)
        return NX_DIRECT_NBYTES;
    if (work->put)
        return NX_WRITE_NBYTES;
    if (work->ways == 1)
        return NX_READ_NBYTES;
    int64_t share = work->left / (2 * work->ways);
    return share > NX_READ_NBYTES ? NX_READ_NBYTES : share < NX_LEAST_NBYTES ? NX_LEAST_NBYTES : share;
}

/* Fills the slot with the next run from the cursor on; moves the cursor. Returns the run's bytes. */
static int64_t nx_next_run(nx_work *work, nx_slot *slot) {
    nx_cursor *cursor = &work->cursor;
    const int32_t *fds = work->fds, *direct_fds = work->direct_fds;
    const int64_t *offsets = work->offsets, *addresses = work->addresses, *lengths = work->lengths, n = work->n;
    while (cursor->i < n && cursor->at == lengths[cursor->i]) {
        cursor->i++;
        cursor->at = 0;
    }
    if (cursor->i == n)
        return 0;
    int64_t i = cursor->i, at = cursor->at;
    slot->put = work->put;
    slot->segment = i;
    slot->buffered_fd = fds[i];
    slot->fd = direct_fds[i] >= 0 ? direct_fds[i] : fds[i];
    int64_t limit = nx_run_limit(work, slot->fd != slot->buffered_fd);
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

/* Decides how a run goes past the page cache: straight, through the bounce buffer, or, an odd edge of a write, through the page cache
   after all. The cursor goes back to where the run ends if it is cut. */
static int nx_plan_direct(nx_work *work, nx_slot *slot) {
    nx_cursor *cursor = &work->cursor;
    const int64_t *lengths = work->lengths, memory_align = work->memory_align, align = work->offset_align;
    int64_t mask = align - 1, want = slot->nbytes;
    int fits = !(slot->offset & mask);
    for (int i = 0; fits && i < slot->niov; i++)
        fits = !((uintptr_t)slot->iov[i].iov_base & (uintptr_t)(memory_align - 1)) &&
               (!((int64_t)slot->iov[i].iov_len & mask) || i == slot->niov - 1);
    if (fits && !(slot->nbytes & mask))
        return NX_STRAIGHT;
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
        *cursor = (nx_cursor){slot->segment, slot->offset - work->offsets[slot->segment]};
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
        return NX_EDGE;
    return fits && !(slot->nbytes & mask) ? NX_STRAIGHT : NX_BOUNCED;
}

/* Puts a run into its bounce buffer, as a request that is aligned; 0 or -errno. */
static int nx_bounce(const nx_work *work, nx_slot *slot) {
    int64_t align = work->offset_align, mask = align - 1;
    int error = nx_make_bounce(slot, align > work->memory_align ? align : work->memory_align);
    if (error)
        return error;
    slot->bounced = 1;
    slot->skip = slot->offset & mask;
    slot->offset -= slot->skip;
    slot->nbytes = (slot->skip + slot->useful + mask) & ~mask;
    if (slot->put)
        nx_scatter(slot, slot->bounce, 1);
    slot->one = (struct iovec){slot->bounce, (size_t)slot->nbytes};
    return 0;
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
