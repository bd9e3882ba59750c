/* The asking side of packed copies: what one thread does to carry out one op with a peer. Part of the unit packed.c. */

typedef struct packed_op packed_op;

/* What this process knows of a lane: its slots from `tail` on, up to `head`, are in use, `owners` says by which op. One op at a time
   posts; ops before it may still wait for their last slots. Whoever needs a slot takes the outcome of the oldest one, his or not:
   the thread whose it is may be waiting for a core. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int posting, waiting, users, used;
    uint32_t tail, head;
    int64_t posted_ns; /* when the last op that others waited for had posted all */
    packed_op *owners[PACKED_SLOTS];
} packed_ours;

struct nx_packed_peer {
    pthread_mutex_t lock;
    int pid, lost;
    uint32_t n_lanes;
    uint64_t identity;
    uint8_t nonce[16];
    packed_directory *directory;
    packed_channel *channel;
    packed_ours lanes[PACKED_LANES];
};

struct packed_op {
    nx_packed_peer *peer;
    packed_ours *ours;
    packed_lane *lane;
    packed_bell *bell;
    int put;
    int64_t n;
    const int64_t *local, *remote, *lengths, *index;
    const uint8_t *keys;
    const int32_t *stop;
    int64_t i, at, step; /* the next byte to post, and how many go into a slot */
    int64_t from[PACKED_SLOTS], from_at[PACKED_SLOTS], bytes[PACKED_SLOTS]; /* of each slot; what is in it the peer could change */
    int posting, slots, status; /* the last two are others' to change too: how many slots are not through, and what went wrong */
    int64_t stall_ns, moved_ns, posted_ns;
};

/* Fills in the next slot, which is free, and posts it. */
static void packed_post(packed_op *op) {
    uint32_t which = op->ours->head % PACKED_SLOTS, n = 0, n_keys = 0, key = 0;
    packed_slot *slot = &op->lane->slots[which];
    int64_t known[PACKED_KEYS], bytes = 0;
    packed_segment last = {0};
    const char *run = NULL;
    char *data = slot->data;
    size_t n_run = 0;
    op->from[which] = op->i;
    op->from_at[which] = op->at;
    while (op->i < op->n && bytes < op->step) {
        int64_t region = op->index ? op->index[op->i] : 0, piece = op->lengths[op->i] - op->at;
        if (piece > op->step - bytes)
            piece = op->step - bytes;
        if (n_keys == 0 || known[key] != region) {
            for (key = 0; key < n_keys && known[key] != region;)
                key++;
            if (key == PACKED_KEYS)
                break;
            if (key == n_keys) {
                known[n_keys] = region;
                memcpy(&slot->keys[n_keys++], op->keys + 8 * region, 8);
            }
        }
        uint64_t address = (uint64_t)op->remote[op->i] + (uint64_t)op->at;
        if (n && last.key == key && last.address + last.nbytes == address) {
            last.nbytes += (uint32_t)piece;
        } else {
            if (n == PACKED_SEGMENTS)
                break;
            if (n)
                slot->segments[n - 1] = last;
            last = (packed_segment){address, (uint32_t)piece, key};
            n++;
        }
        if (op->put) {
            const char *memory = (const char *)(uintptr_t)op->local[op->i] + op->at;
            if (run + n_run != memory || !n_run) {
                packed_prefetch(memory, (size_t)piece);
                if (n_run)
                    memcpy(data, run, n_run);
                data += n_run;
                run = memory;
                n_run = 0;
            }
            n_run += (size_t)piece;
        }
        bytes += piece;
        op->at += piece;
        if (op->at == op->lengths[op->i]) {
            op->i++;
            op->at = 0;
        }
    }
    if (n_run)
        memcpy(data, run, n_run);
    slot->segments[n - 1] = last;
    slot->put = (uint32_t)op->put;
    slot->n_segments = n;
    slot->n_keys = n_keys;
    slot->nbytes = (uint64_t)(op->bytes[which] = bytes);
    slot->cpu = (uint32_t)sched_getcpu();
    pthread_mutex_lock(&op->ours->lock);
    op->ours->owners[which] = op;
    op->slots++;
    packed_store(&op->lane->next, ++op->ours->head);
    packed_store(&slot->state, SLOT_POSTED);
    pthread_mutex_unlock(&op->ours->lock);
    packed_ring(op->bell);
}

/* Spreads what a read has brought over our memory. */
static void packed_scatter(packed_op *op, packed_slot *slot, uint32_t which) {
    int64_t i = op->from[which], at = op->from_at[which], left = op->bytes[which];
    const char *data = slot->data;
    while (left > 0) {
        char *memory = (char *)(uintptr_t)op->local[i] + at;
        int64_t piece = op->lengths[i] - at;
        /* Neighbours are written in one go. */
        while (piece < left && op->local[i + 1] == op->local[i] + op->lengths[i]) {
            piece += op->lengths[++i];
        }
        if (piece > left)
            piece = left;
        copy_past_cache(memory, data, (size_t)piece);
        data += piece;
        left -= piece;
        at = 0;
        i++;
    }
    past_cache_done();
}

/* The first thing that went wrong is what an op ends with. */
static void packed_fail(packed_op *op, int status) {
    int none = 0;
    __atomic_compare_exchange_n(&op->status, &none, status, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Takes the outcome of the lane's oldest slot, if it has one; returns whether it had. */
static int packed_reap(packed_ours *ours, packed_lane *lane) {
    pthread_mutex_lock(&ours->lock);
    uint32_t which = ours->tail % PACKED_SLOTS;
    packed_slot *slot = &lane->slots[which];
    packed_op *op = ours->owners[which];
    int any = ours->tail != ours->head && (!op || packed_load(&slot->state) == SLOT_DONE);
    if (any)
        ours->tail++;
    pthread_mutex_unlock(&ours->lock);
    /* One without an owner was taken back: the peer frees it. */
    if (!any || !op)
        return any;
    if (slot->status)
        packed_fail(op, (int)slot->status);
    else if (!op->put && !packed_load(&op->status))
        packed_scatter(op, slot, which);
    packed_store(&slot->state, SLOT_FREE);
    __atomic_store_n(&op->moved_ns, packed_clock(), __ATOMIC_RELAXED);
    /* After this the op may be gone. */
    __atomic_sub_fetch(&op->slots, 1, __ATOMIC_ACQ_REL);
    packed_answer(lane);
    return 1;
}

/* Takes back what the peer has not begun, and a read that it has: that changes no memory but the slot's. `all`: the rest too. */
static void packed_take_back(packed_op *op, int all) {
    packed_ours *ours = op->ours;
    int any = 0;
    pthread_mutex_lock(&ours->lock);
    for (uint32_t number = ours->head; number != ours->tail; number--) {
        uint32_t which = (number - 1) % PACKED_SLOTS;
        uint32_t *state = &op->lane->slots[which].state;
        if (ours->owners[which] == op && (packed_change(state, SLOT_POSTED, SLOT_RETRACTED) || all ||
                                          (!op->put && packed_change(state, SLOT_BUSY, SLOT_ORPHANED)))) {
            ours->owners[which] = NULL;
            __atomic_sub_fetch(&op->slots, 1, __ATOMIC_ACQ_REL);
            any = 1;
        }
    }
    pthread_mutex_unlock(&ours->lock);
    if (any) {
        packed_ring(op->bell);
        packed_answer(op->lane);
    }
}

static int packed_gone(packed_op *op) {
    if (__atomic_load_n(&op->peer->lost, __ATOMIC_RELAXED))
        return -ESRCH;
    if (packed_load(&op->peer->channel->closed))
        return -ENOTCONN;
    if (op->stop && __atomic_load_n(op->stop, __ATOMIC_RELAXED))
        return -ECANCELED;
    return 0;
}

static int packed_is_free(packed_op *op) {
    packed_ours *ours = op->ours;
    return ours->head - __atomic_load_n(&ours->tail, __ATOMIC_ACQUIRE) < PACKED_SLOTS &&
           packed_load(&op->lane->slots[ours->head % PACKED_SLOTS].state) == SLOT_FREE;
}

/* Whether there is something to do for an op that posts, or waits for its slots. */
static int packed_can_go_on(packed_op *op) {
    packed_ours *ours = op->ours;
    uint32_t tail = __atomic_load_n(&ours->tail, __ATOMIC_RELAXED);
    int status = packed_load(&op->status);
    if (op->posting ? packed_is_free(op) : !packed_load(&op->slots))
        return 1;
    if (tail != __atomic_load_n(&ours->head, __ATOMIC_RELAXED) &&
        (!__atomic_load_n(&ours->owners[tail % PACKED_SLOTS], __ATOMIC_RELAXED) ||
         packed_load(&op->lane->slots[tail % PACKED_SLOTS].state) == SLOT_DONE))
        return 1;
    /* What ends the op is news as long as it has not been heard; that the peer is lost always is. */
    return status ? op->posting || __atomic_load_n(&op->peer->lost, __ATOMIC_RELAXED) : packed_gone(op) != 0;
}

/* Waits until the op can go on, or until the peer has done nothing for it for long. */
static void packed_wait(packed_op *op) {
    int64_t began = packed_clock();
    while (packed_clock() - began < PACKED_SPIN_NS) {
        if (packed_can_go_on(op))
            return;
        packed_pause();
    }
    int64_t stall = packed_load(&op->status) ? 0 : op->stall_ns;
    for (;;) {
        __atomic_add_fetch(&op->lane->waiters, 1, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        uint32_t word = __atomic_load_n(&op->lane->answer, __ATOMIC_SEQ_CST);
        int go = packed_can_go_on(op);
        int64_t left = stall ? __atomic_load_n(&op->moved_ns, __ATOMIC_RELAXED) + stall - packed_clock() : 0;
        if (!go && (!stall || left > 0))
            packed_sleep(&op->lane->answer, word, left);
        __atomic_sub_fetch(&op->lane->waiters, 1, __ATOMIC_SEQ_CST);
        if (go)
            return;
        if (stall && left <= 0) {
            packed_fail(op, -EAGAIN);
            return;
        }
    }
}

static void packed_carry_out(packed_op *op) {
    int gone;
    while (op->i < op->n && !packed_load(&op->status)) {
        if (packed_is_free(op))
            packed_post(op);
        else if (!packed_reap(op->ours, op->lane))
            packed_wait(op);
        if ((gone = packed_gone(op)))
            packed_fail(op, gone);
    }
    pthread_mutex_lock(&op->ours->lock);
    op->posting = op->ours->posting = 0;
    op->posted_ns = op->ours->posted_ns = op->ours->waiting ? packed_clock() : 0;
    pthread_cond_signal(&op->ours->turn);
    pthread_mutex_unlock(&op->ours->lock);
    while (packed_load(&op->slots)) {
        if ((gone = packed_gone(op)))
            packed_fail(op, gone);
        if (packed_load(&op->status))
            packed_take_back(op, __atomic_load_n(&op->peer->lost, __ATOMIC_RELAXED));
        if (!packed_reap(op->ours, op->lane) && packed_load(&op->slots))
            packed_wait(op);
    }
}

/* Moves `n` segments, segment i between local[i] and remote[i], which lies in the peer's region of key index[i] of `keys` (index
   NULL: all in the first). Returns 0 when all is in place; a refusal (> 0); -ECANCELED when *stop was set; -ESRCH when the peer
   is lost; -ENOTCONN when it serves us no longer; -EAGAIN when it has done nothing for `stall_ns` (0: wait for ever). However it
   ends, nothing moves any more on its account. *spent_ns: how long it kept the lane from other ops; 0 if that is not typical. */
int nx_packed_move(nx_packed_peer *peer, int put, int64_t n, const int64_t *local, const int64_t *remote, const int64_t *lengths,
                   const int64_t *index, const uint8_t *keys, const int32_t *stop, int64_t stall_ns,
                   int64_t *spent_ns) {
    packed_op op = {.peer = peer, .put = put != 0, .n = n, .local = local, .remote = remote, .lengths = lengths, .index = index,
                    .keys = keys, .stop = stop, .stall_ns = stall_ns, .posting = 1};
    int64_t nbytes = 0;
    for (int64_t i = 0; i < n; i++)
        nbytes += lengths[i];
    /* Both sides copy at once only from the second slot on. */
    op.step = nbytes / 8 < PACKED_LEAST ? PACKED_LEAST : nbytes / 8 > PACKED_BYTES ? PACKED_BYTES : nbytes / 8;
    pthread_mutex_lock(&peer->lock);
    uint32_t best = 0;
    for (uint32_t i = 1; i < peer->n_lanes; i++)
        if (peer->lanes[i].users < peer->lanes[best].users)
            best = i;
    op.ours = &peer->lanes[best];
    op.ours->users++;
    pthread_mutex_unlock(&peer->lock);
    op.lane = &peer->channel->lanes[best];
    op.bell = &peer->directory->bells[best];
    pthread_mutex_lock(&op.ours->lock);
    int waited = op.ours->posting;
    op.ours->waiting++;
    while (op.ours->posting && !(op.status = packed_gone(&op)))
        pthread_cond_wait(&op.ours->turn, &op.ours->lock);
    op.ours->waiting--;
    int64_t began = op.moved_ns = packed_clock();
    if (waited && op.ours->posted_ns)
        began = op.ours->posted_ns;
    int turn = !op.ours->posting, first = !op.ours->used;
    if (turn)
        op.ours->posting = op.ours->used = 1;
    pthread_mutex_unlock(&op.ours->lock);
    if (turn) {
        __atomic_add_fetch(&op.lane->active, 1, __ATOMIC_RELAXED);
        packed_carry_out(&op);
        __atomic_sub_fetch(&op.lane->active, 1, __ATOMIC_RELAXED);
    }
    /* The first op of a lane maps its pages, which says nothing of those to come. */
    *spent_ns = first ? 0 : (op.posted_ns ? op.posted_ns : packed_clock()) - began;
    pthread_mutex_lock(&peer->lock);
    op.ours->users--;
    pthread_mutex_unlock(&peer->lock);
    return op.status;
}

/* Makes every op look at its `stop` again. */
void nx_packed_wake(nx_packed_peer *peer) {
    for (uint32_t i = 0; i < peer->n_lanes; i++) {
        packed_ours *ours = &peer->lanes[i];
        pthread_mutex_lock(&ours->lock);
        pthread_cond_broadcast(&ours->turn);
        pthread_mutex_unlock(&ours->lock);
        packed_answer(&peer->channel->lanes[i]);
    }
}

/* Ends every op, those of which the peer has begun a slot too: its process has ended, or answers no more. */
void nx_packed_lost(nx_packed_peer *peer) {
    __atomic_store_n(&peer->lost, 1, __ATOMIC_SEQ_CST);
    nx_packed_wake(peer);
}

/* Opens the directory that a peer's process has as `fd`. Returns NULL and *error, -errno, where that cannot be done. */
nx_packed_peer *nx_packed_dial(int pid, int fd, const uint8_t *nonce, uint64_t identity, int *error) {
    nx_packed_peer *peer = calloc(1, sizeof *peer);
    errno = ENOMEM;
    packed_directory *directory = peer ? packed_map_of(pid, fd, sizeof *directory) : NULL;
    *error = -errno;
    if (directory && (packed_load(&directory->magic) != PACKED_MAGIC || memcmp(directory->nonce, nonce, 16))) {
        munmap(directory, sizeof *directory);
        directory = NULL;
        *error = -EPROTO;
    }
    if (!directory) {
        free(peer);
        return NULL;
    }
    peer->pid = pid;
    peer->identity = identity;
    peer->directory = directory;
    memcpy(peer->nonce, nonce, 16);
    pthread_mutex_init(&peer->lock, NULL);
    for (int i = 0; i < PACKED_LANES; i++) {
        pthread_mutex_init(&peer->lanes[i].lock, NULL);
        pthread_cond_init(&peer->lanes[i].turn, NULL);
    }
    *error = 0;
    return peer;
}

/* Returns how many lanes the peer serves us on, 0 as long as it has not accepted us, or -errno when they cannot be opened. Called by
   one thread at a time. */
int nx_packed_ready(nx_packed_peer *peer) {
    if (peer->channel)
        return packed_load(&peer->channel->closed) ? -ENOTCONN : (int)peer->n_lanes;
    uint32_t n_lanes = peer->directory->n_threads;
    if (n_lanes == 0 || n_lanes > PACKED_LANES)
        return -EPROTO;
    for (int i = 0; i < PACKED_PEERS; i++) {
        packed_entry *entry = &peer->directory->entries[i];
        if (packed_load(&entry->identity) != peer->identity)
            continue;
        size_t nbytes = packed_channel_nbytes(n_lanes);
        packed_channel *channel = packed_map_of(peer->pid, entry->fd, nbytes);
        if (!channel)
            return -errno;
        if (channel->magic != PACKED_MAGIC || channel->identity != peer->identity || channel->n_lanes != n_lanes ||
            memcmp(channel->nonce, peer->nonce, 16)) {
            munmap(channel, nbytes);
            return -EPROTO;
        }
        for (uint32_t lane = 0; lane < n_lanes; lane++)
            peer->lanes[lane].tail = peer->lanes[lane].head = packed_load(&channel->lanes[lane].next);
        peer->n_lanes = n_lanes;
        peer->channel = channel;
        return (int)n_lanes;
    }
    return 0;
}

/* Frees the peer; no op may be under way. */
void nx_packed_hangup(nx_packed_peer *peer) {
    if (peer->channel)
        munmap(peer->channel, packed_channel_nbytes(peer->n_lanes));
    munmap(peer->directory, sizeof *peer->directory);
    for (int i = 0; i < PACKED_LANES; i++) {
        pthread_cond_destroy(&peer->lanes[i].turn);
        pthread_mutex_destroy(&peer->lanes[i].lock);
    }
    pthread_mutex_destroy(&peer->lock);
    free(peer);
}
