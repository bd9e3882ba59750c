/* The socket engine's types, its table of regions and its completions. Part of the unit tcp.c.

   Locks, in the order in which they may nest: a stream's `lock` (its socket and queues), a loop's `lock` (inbox and list of
   streams), the lock of the engine's `regions`, the engine's `guests_lock` and `done_lock`; `strangers_lock` comes after a
   stream's lock. */
#define TCP_MAGIC 0x5458494eu
#define TCP_HELLO "nixltcp1"
#define TCP_MAX_IDENTITY 1024
#define TCP_MAX_SEGMENTS 65536
#define TCP_MAX_OP (1ull << 30)
#define TCP_CREDITS 64
#define TCP_MAX_STRANGERS 256
#define TCP_SOURCES 1024
#define TCP_STAGE (32 << 10)
#define TCP_IOV 1024
#define TCP_CHUNK (1 << 20)
/* What one readv takes. Small: the kernel's buffers come back while they are in the cache; 1 MiB costs a third of the speed on loopback. */
#define TCP_RECEIVE (64 << 10)
/* Payload for so many places is received in one piece and spread from there: the kernel is slow at filling small ones. */
#define TCP_SPREAD 12
#define TCP_QUANTUM (4 << 20)
#define TCP_STALE_NS 1000000000ll
#define TCP_MAX_LISTENERS 16

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the tcp backend's frames are little-endian and are not converted"
#endif

enum { TCP_PUT = 1, TCP_GET, TCP_ACK, TCP_DATA, TCP_REFUSED };
/* Beside those of regions.c. */
enum { TCP_NO_MEMORY = 4 };
enum { RX_HELLO, RX_HEAD, RX_TABLE, RX_PAYLOAD, RX_DISCARD };
enum { DO_SUBMIT, DO_CANCEL, DO_DROP, DO_DROP_ACCEPTED, DO_CUT_REGION };

typedef struct {
    uint32_t magic;
    uint8_t kind, status;
    uint16_t zero;
    uint32_t n_segments, n_keys;
    uint64_t id, nbytes;
} tcp_header;

typedef struct {
    char magic[8];
    uint8_t token[16];
    uint32_t n_identity, zero;
} tcp_hello;

/* A place in a registered region as it travels; once checked it becomes an iovec in the same 16 bytes. */
typedef union {
    struct {
        uint64_t address;
        uint32_t nbytes, key;
    } segment;
    struct iovec iov;
} tcp_entry;

_Static_assert(sizeof(tcp_header) == 32 && sizeof(tcp_hello) == 32 && sizeof(tcp_entry) == 16, "frames have no padding");

/* A request or a reply. `head` is what is sent first (header, keys, segments), `iov` our memory: sent behind the head (PUT,
   DATA) or filled by what arrives (GET, a peer's PUT). */
typedef struct tcp_frame {
    struct tcp_frame *next;
    tcp_header header;
    char *memory; /* what `head` and `iov` point into, unless `head` is `header` */
    const char *head;
    size_t n_head, head_done;
    tcp_entry *iov;
    int64_t n_iov, at;
    uint64_t left;
    nx_region **held;
    uint32_t n_held;
    int cancelled;
    uint64_t seen;
} tcp_frame;

typedef struct {
    tcp_frame *first, **end;
} tcp_queue;

typedef struct tcp_loop tcp_loop;

struct nx_tcp_stream {
    nx_tcp_stream *next, *previous, *next_ready;
    tcp_loop *loop;
    int refs; /* atomic: the loop's, and that of whoever called nx_tcp_adopt */
    pthread_mutex_t lock;
    int fd, ours, in_ready, readable, writable, ended;
    int64_t id;
    /* An express stream is driven by its owner's thread instead of a loop; `express` is its socket, open until it is forgotten.
       `now` is the request whose end nx_tcp_now waits for, `now_status` how it ended. */
    int express;
    int64_t now, now_status;
    tcp_queue queue, waiting;
    int requests; /* of ours sent or being sent and not answered; of theirs not answered wholly */
    uint64_t moved;
    int64_t last_rx_ns, since_ns;
    int phase;
    nx_tcp_stream *older, *newer; /* among those that have not introduced themselves */
    int stranger;
    unsigned source; /* where it comes from, as an index of the engine's `from` */
    tcp_header rx;
    tcp_frame *rx_frame;
    char *rx_table;
    size_t rx_table_done, rx_table_nbytes;
    uint64_t rx_discard;
    uint8_t rx_status;
    char *stage, *bounce;
    size_t stage_at, stage_end;
    uint64_t guest; /* who it is, once it has shown the token of `identity` */
    uint32_t n_identity;
    char identity[TCP_MAX_IDENTITY];
};

typedef struct tcp_command {
    struct tcp_command *next;
    int kind;
    nx_tcp_stream *stream;
    tcp_frame *frame;
    int64_t id;
    uint64_t key;
    int *countdown;
    uint32_t n_identity;
    char identity[];
} tcp_command;

struct tcp_loop {
    nx_tcp *engine;
    pthread_t thread;
    pthread_mutex_t lock;
    int epoll_fd, wake_fd, started, sleeping, stop, brisk; /* `brisk` > 0: events have come soon */
    int64_t swept_ns;
    tcp_command *first, **end;
    nx_tcp_stream *streams, *express, *ready, *ended; /* all but `ready`, which is the thread's alone, under `lock` */
};

/* Somebody who may connect: what it calls itself, and the token that it alone was told. Numbers are never used again. */
typedef struct tcp_guest {
    struct tcp_guest *next;
    uint64_t number;
    uint8_t token[16];
    uint32_t n_identity;
    char identity[];
} tcp_guest;

typedef struct {
    int64_t id, status;
} tcp_completion;

struct nx_tcp {
    int event_fd, n_loops, n_listeners, listeners[TCP_MAX_LISTENERS];
    unsigned next_loop;
    pthread_mutex_t strangers_lock;
    int strangers; /* how many; all of them from the oldest to the newest, and how many come from each source */
    nx_tcp_stream *oldest, *newest;
    uint16_t from[TCP_SOURCES];
    nx_region_table regions;
    pthread_mutex_t guests_lock;
    tcp_guest *guests;
    uint64_t last_guest;
    pthread_mutex_t done_lock;
    tcp_completion *done;
    int64_t n_done, at_done, room_done;
    int64_t read_nbytes, written_nbytes; /* by peers' requests that were granted; atomic */
    tcp_loop loops[];
};

static int64_t tcp_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void tcp_push(tcp_queue *queue, tcp_frame *frame) {
    frame->next = NULL;
    *queue->end = frame;
    queue->end = &frame->next;
}

static tcp_frame *tcp_pop(tcp_queue *queue) {
    tcp_frame *frame = queue->first;
    queue->first = frame->next;
    if (!queue->first)
        queue->end = &queue->first;
    return frame;
}

/* Strangers. */

static void tcp_unref(nx_tcp_stream *stream) {
    if (__atomic_sub_fetch(&stream->refs, 1, __ATOMIC_ACQ_REL))
        return;
    if (stream->express >= 0)
        close(stream->express);
    pthread_mutex_destroy(&stream->lock);
    free(stream->stage);
    free(stream->bounce);
    free(stream);
}

static void tcp_stranger_came(nx_tcp *engine, nx_tcp_stream *stream) {
    pthread_mutex_lock(&engine->strangers_lock);
    stream->stranger = 1;
    stream->older = engine->newest;
    if (engine->newest)
        engine->newest->newer = stream;
    else
        engine->oldest = stream;
    engine->newest = stream;
    engine->from[stream->source]++;
    engine->strangers++;
    pthread_mutex_unlock(&engine->strangers_lock);
}

static void tcp_unlink_stranger(nx_tcp *engine, nx_tcp_stream *stream) {
    *(stream->older ? &stream->older->newer : &engine->oldest) = stream->newer;
    *(stream->newer ? &stream->newer->older : &engine->newest) = stream->older;
    stream->older = stream->newer = NULL;
    stream->stranger = 0;
    engine->from[stream->source]--;
    engine->strangers--;
}

/* It has introduced itself, or has ended. */
static void tcp_stranger_went(nx_tcp *engine, nx_tcp_stream *stream) {
    pthread_mutex_lock(&engine->strangers_lock);
    if (stream->stranger)
        tcp_unlink_stranger(engine, stream);
    pthread_mutex_unlock(&engine->strangers_lock);
}

/* Makes room for one more: whoever fills it gives way, the oldest of the source that has the most. Its loop hears of the end. */
static void tcp_make_room(nx_tcp *engine) {
    pthread_mutex_lock(&engine->strangers_lock);
    nx_tcp_stream *found = engine->strangers < TCP_MAX_STRANGERS ? NULL : engine->oldest;
    for (nx_tcp_stream *one = found; one; one = one->newer)
        if (engine->from[one->source] > engine->from[found->source])
            found = one;
    if (found) {
        tcp_unlink_stranger(engine, found);
        __atomic_add_fetch(&found->refs, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&engine->strangers_lock);
    if (!found)
        return;
    pthread_mutex_lock(&found->lock);
    if (found->fd >= 0 && found->phase == RX_HELLO)
        shutdown(found->fd, SHUT_RDWR);
    pthread_mutex_unlock(&found->lock);
    tcp_unref(found);
}

/* Completions. */

static void tcp_complete(nx_tcp *engine, int64_t id, int64_t status) {
    pthread_mutex_lock(&engine->done_lock);
    if (engine->n_done == engine->room_done) {
        int64_t room = engine->room_done ? 2 * engine->room_done : 256;
        tcp_completion *grown = realloc(engine->done, (size_t)room * sizeof *grown);
        if (!grown)
            abort(); /* Losing a completion would leave a caller waiting for ever. */
        engine->done = grown;
        engine->room_done = room;
    }
    engine->done[engine->n_done++] = (tcp_completion){id, status};
    int first = engine->n_done - engine->at_done == 1;
    pthread_mutex_unlock(&engine->done_lock);
    if (first) {
        uint64_t one = 1;
        while (write(engine->event_fd, &one, 8) < 0 && errno == EINTR) {}
    }
}

int nx_tcp_completions(nx_tcp *engine, int64_t *ids, int64_t *statuses, int max) {
    uint64_t drained;
    while (read(engine->event_fd, &drained, 8) < 0 && errno == EINTR) {}
    pthread_mutex_lock(&engine->done_lock);
    int n = 0;
    while (n < max && engine->at_done < engine->n_done) {
        tcp_completion *one = &engine->done[engine->at_done++];
        ids[n] = one->id;
        statuses[n++] = one->status;
    }
    int more = engine->at_done < engine->n_done;
    if (!more)
        engine->at_done = engine->n_done = 0;
    pthread_mutex_unlock(&engine->done_lock);
    if (more) {
        uint64_t one = 1;
        while (write(engine->event_fd, &one, 8) < 0 && errno == EINTR) {}
    }
    return n;
}

/* Guests. */

static int tcp_equal(const uint8_t *a, const uint8_t *b, size_t n) {
    uint8_t differ = 0;
    for (size_t i = 0; i < n; i++)
        differ |= a[i] ^ b[i];
    return differ == 0;
}

static tcp_guest **tcp_find_guest(nx_tcp *engine, const void *identity, size_t n_identity) {
    tcp_guest **place = &engine->guests;
    while (*place && ((*place)->n_identity != n_identity || memcmp((*place)->identity, identity, n_identity)))
        place = &(*place)->next;
    return place;
}

/* Returns the number of the guest whose identity the introduction begins with if the token is its own, else 0. An identity ends in
   the second of its two zero bytes: no other begins with it. */
static uint64_t tcp_recognise(nx_tcp *engine, const char *introduction, size_t n, const uint8_t *token) {
    pthread_mutex_lock(&engine->guests_lock);
    tcp_guest *guest = engine->guests;
    while (guest && (guest->n_identity > n || memcmp(guest->identity, introduction, guest->n_identity)))
        guest = guest->next;
    uint64_t number = guest && tcp_equal(guest->token, token, 16) ? guest->number : 0;
    pthread_mutex_unlock(&engine->guests_lock);
    return number;
}

/* Lets whoever calls itself `identity` and shows `token` connect, and returns its number, or -ENOMEM or -EINVAL. Invited before,
   it keeps its number, and the token that it was told is written to `token`. */
int64_t nx_tcp_invite(nx_tcp *engine, const uint8_t *identity, int64_t n_identity, uint8_t *token) {
    if (n_identity < 0 || n_identity > TCP_MAX_IDENTITY)
        return -EINVAL;
    pthread_mutex_lock(&engine->guests_lock);
    tcp_guest **place = tcp_find_guest(engine, identity, (size_t)n_identity), *guest = *place;
    if (guest) {
        memcpy(token, guest->token, 16);
    } else if ((guest = malloc(sizeof *guest + (size_t)n_identity))) {
        *guest = (tcp_guest){.number = ++engine->last_guest, .n_identity = (uint32_t)n_identity};
        memcpy(guest->token, token, 16);
        memcpy(guest->identity, identity, (size_t)n_identity);
        *place = guest;
    }
    int64_t number = guest ? (int64_t)guest->number : -ENOMEM;
    pthread_mutex_unlock(&engine->guests_lock);
    return number;
}

static void tcp_dismiss(nx_tcp *engine, const uint8_t *identity, size_t n_identity) {
    pthread_mutex_lock(&engine->guests_lock);
    tcp_guest **place = tcp_find_guest(engine, identity, n_identity), *guest = *place;
    if (guest)
        *place = guest->next;
    pthread_mutex_unlock(&engine->guests_lock);
    free(guest);
}

/* Regions. */

/* `guest`: what nx_tcp_invite returned for the only one that may use the key; 0 for all. */
int nx_tcp_register(nx_tcp *engine, uint64_t key, int64_t address, int64_t nbytes, int readonly, uint64_t guest) {
    return regions_add(&engine->regions, key, address, nbytes, readonly, guest);
}

/* Refuses the region from here on; `id` completes once no peer's request touches it. */
int nx_tcp_unregister(nx_tcp *engine, uint64_t key, int64_t id) {
    int status = regions_remove(&engine->regions, key, id);
    if (status != -EBUSY)
        tcp_complete(engine, id, status);
    return 0;
}

static void tcp_release(nx_tcp *engine, tcp_frame *frame) {
    for (uint32_t i = 0; i < frame->n_held; i++) {
        int64_t id = regions_release(&engine->regions, frame->held[i]);
        if (id)
            tcp_complete(engine, id, 0);
    }
    frame->n_held = 0;
}

static void tcp_free(nx_tcp *engine, tcp_frame *frame) {
    tcp_release(engine, frame);
    free(frame->held);
    free(frame->memory);
    free(frame);
}

/* Holds the regions that a peer's request names, checks every segment, and turns the segments into iovecs. Returns 0 or the
   status to refuse with; then nothing is held. */
static int tcp_admit(nx_tcp *engine, uint64_t guest, tcp_frame *frame) {
    uint32_t n_keys = frame->header.n_keys;
    frame->held = malloc(n_keys * sizeof *frame->held);
    if (!frame->held)
        return TCP_NO_MEMORY;
    const uint64_t *keys = (const uint64_t *)(const void *)frame->memory;
    int status = regions_hold(&engine->regions, guest, keys, n_keys, frame->header.kind == TCP_PUT, frame->held);
    if (status)
        return status;
    frame->n_held = n_keys;
    for (int64_t i = 0; i < frame->n_iov && !status; i++) {
        tcp_entry entry = frame->iov[i];
        uint64_t address = entry.segment.address, nbytes = entry.segment.nbytes;
        if (!region_has(frame->held[entry.segment.key], address, nbytes))
            status = REGION_OUT_OF_RANGE;
        frame->iov[i].iov = (struct iovec){(void *)(uintptr_t)address, nbytes};
    }
    if (status)
        tcp_release(engine, frame);
    return status;
}
