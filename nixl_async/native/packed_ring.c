/* What two processes share for packed copies, and how they wait for each other. Part of the unit packed.c.

   The serving side has one file (memfd) with the bells of its threads and a directory of the peers it has accepted, and one file
   for each of those: its lanes, each a ring of slots. Both sides go round a lane's slots in the same order. A slot's `state` says
   whose it is:

       FREE -> POSTED     the asking side has filled it in
       POSTED -> BUSY     the serving side copies
       BUSY -> DONE       it has copied, or refused; the asking side reads the outcome, then FREE
       POSTED -> RETRACTED -> FREE     taken back before it was begun; the serving side passes over it
       BUSY -> ORPHANED -> FREE        a read that nobody waits for any more: it changes the slot only

   Waiting is on a futex after some looking; who waits says so first, and whoever changes a state looks for that afterwards. */
#define PACKED_MAGIC 0x316465636b61706eull
#define PACKED_LANES 4
#define PACKED_PEERS 1024
#define PACKED_PAGE 4096
#define PACKED_SLOTS 4
#define PACKED_BYTES (256 << 10)
#define PACKED_LEAST (32 << 10)
#define PACKED_SEGMENTS 4096
#define PACKED_KEYS 16
#define PACKED_PREFETCH 4096
/* How long a side looks for the other's next step while an op is going on before it sleeps: waking it takes about as long. */
#define PACKED_SPIN_NS 50000

enum { SLOT_FREE, SLOT_POSTED, SLOT_BUSY, SLOT_DONE, SLOT_RETRACTED, SLOT_ORPHANED };
/* Beside those of regions.c. */
enum { PACKED_MALFORMED = 16 };

typedef struct {
    uint32_t word, sleeping;
    char apart[56];
} packed_bell;

typedef struct {
    uint64_t identity;
    int32_t fd;
    uint32_t zero;
} packed_entry;

typedef struct {
    uint64_t magic;
    uint8_t nonce[16];
    uint32_t n_threads, zero;
    packed_bell bells[PACKED_LANES] __attribute__((aligned(64)));
    packed_entry entries[PACKED_PEERS] __attribute__((aligned(PACKED_PAGE)));
} packed_directory;

typedef struct {
    uint64_t address;
    uint32_t nbytes, key;
} packed_segment;

typedef struct {
    uint32_t state, status, put, n_segments, n_keys, cpu;
    uint64_t nbytes, keys[PACKED_KEYS];
    packed_segment segments[PACKED_SEGMENTS] __attribute__((aligned(256)));
    char data[PACKED_BYTES] __attribute__((aligned(256)));
} packed_slot;

typedef struct {
    uint32_t answer, waiters, active, next;
    packed_slot slots[PACKED_SLOTS] __attribute__((aligned(PACKED_PAGE)));
} packed_lane __attribute__((aligned(PACKED_PAGE)));

typedef struct {
    uint64_t magic, identity;
    uint8_t nonce[16];
    uint32_t n_lanes, closed;
    packed_lane lanes[] __attribute__((aligned(PACKED_PAGE)));
} packed_channel;

_Static_assert(sizeof(packed_segment) == 16 && sizeof(packed_entry) == 16 && sizeof(packed_bell) == 64, "no padding");
_Static_assert(PACKED_SEGMENTS * 16 >= PACKED_LEAST, "slots");

#define packed_load(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
#define packed_store(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)

static int packed_change(uint32_t *state, uint32_t from, uint32_t to) {
    return __atomic_compare_exchange_n(state, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static int64_t packed_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void packed_pause(void) {
    for (int i = 0; i < 8; i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

/* Sleeps while *word is `value`, at most `ns` nanoseconds if that is positive. */
static void packed_sleep(uint32_t *word, uint32_t value, int64_t ns) {
    struct timespec limit = {ns / 1000000000, ns % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT, value, ns > 0 ? &limit : NULL, NULL, 0);
}

static void packed_ring(packed_bell *bell) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&bell->sleeping, __ATOMIC_RELAXED) && __atomic_exchange_n(&bell->sleeping, 0, __ATOMIC_SEQ_CST)) {
        __atomic_add_fetch(&bell->word, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &bell->word, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
}

static void packed_answer(packed_lane *lane) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&lane->waiters, __ATOMIC_RELAXED)) {
        __atomic_add_fetch(&lane->answer, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &lane->answer, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

/* Brings the beginning of what is copied next into the cache. The hardware sees where a segment goes on, not where the next is. */
static void packed_prefetch(const char *src, size_t n) {
    for (size_t i = 0; i < n && i < PACKED_PREFETCH; i += 64)
        __builtin_prefetch(src + i);
}

static size_t packed_channel_nbytes(uint32_t n_lanes) { return sizeof(packed_channel) + n_lanes * sizeof(packed_lane); }

/* Makes a file of zeros that cannot shrink, so that no access to a mapping of it can fail. Returns a descriptor or -errno. */
static int packed_new_file(size_t nbytes) {
    int fd = memfd_create("nixl-packed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)nbytes) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

/* Maps `nbytes` bytes of a file, of which there must be exactly as many. Returns NULL with `errno` set. */
static void *packed_map(int fd, size_t nbytes) {
    struct stat stat;
    int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &stat))
        return NULL;
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || stat.st_size != (off_t)nbytes) {
        errno = EPROTO;
        return NULL;
    }
    void *found = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return found == MAP_FAILED ? NULL : found;
}

/* Maps a file that another process has open as `fd`. */
static void *packed_map_of(int pid, int fd, size_t nbytes) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
    int opened = open(path, O_RDWR | O_CLOEXEC);
    if (opened < 0)
        return NULL;
    void *found = packed_map(opened, nbytes);
    int error = errno;
    close(opened);
    errno = error;
    return found;
}
