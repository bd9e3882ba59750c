/* One io_uring: its requests and cancellations, by the slots they belong to. Part of the unit file.c. */
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
