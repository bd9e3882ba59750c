/* Copies between two processes of one host through shared memory: one side packs segments into slots of a ring, a native thread
   of the other scatters them, or gathers in answer, and both copy at the same time. A segment costs no system call and pins no
   page. The serving threads never need the GIL, and check every range against what is registered, as tcp.c does.

   `packed_ring.c` has what both sides share, `packed_peer.c` the asking side; this file is the serving one. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "packed.h"
#include "past_cache.c"
#include "regions.c"
#include "packed_ring.c"
#include "packed_peer.c"

/* How many slots of a peer a thread serves before it looks at the others. */
#define PACKED_TURN 4
#define PACKED_PART_NS 200000

typedef struct {
    packed_channel *shared;
    uint64_t identity;
    int fd, serving, closed;
    packed_entry *entry;
    uint32_t at[PACKED_LANES];
} packed_client;

typedef struct {
    nx_packed *server;
    pthread_t thread;
    uint32_t lane;
    int64_t parted_ns;
    packed_segment segments[PACKED_SEGMENTS];
} packed_thread;

/* `lock` guards the clients and the table's removals; `quiet` tells of either becoming quiet. */
struct nx_packed {
    int fd, n_threads, n_started, stop;
    packed_directory *directory;
    pthread_mutex_t lock;
    pthread_cond_t quiet;
    packed_client *clients[PACKED_PEERS];
    int n_clients;
    nx_region_table regions;
    int64_t read_nbytes, written_nbytes; /* by peers; atomic */
    packed_thread *threads;
};

/* Serving. */

static void packed_release(nx_packed *server, nx_region **held, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        if (regions_release(&server->regions, held[i])) {
            pthread_mutex_lock(&server->lock);
            pthread_cond_broadcast(&server->quiet);
            pthread_mutex_unlock(&server->lock);
        }
    }
}

/* Copies what a slot asks for; returns 0 or why it is refused. The list is read once: what is checked is what is followed. */
static uint32_t packed_serve(packed_thread *self, packed_slot *slot) {
    nx_packed *server = self->server;
    nx_region *held[PACKED_KEYS];
    uint64_t keys[PACKED_KEYS], left = slot->nbytes;
    uint32_t n = slot->n_segments, n_keys = slot->n_keys, put = slot->put;
    if (n == 0 || n > PACKED_SEGMENTS || n_keys == 0 || n_keys > PACKED_KEYS || left == 0 || left > PACKED_BYTES || put > 1)
        return PACKED_MALFORMED;
    memcpy(keys, slot->keys, 8 * n_keys);
    memcpy(self->segments, slot->segments, n * sizeof *self->segments);
    uint32_t status = (uint32_t)regions_hold(&server->regions, 0, keys, n_keys, (int)put, held);
    if (status)
        return status;
    for (uint32_t i = 0; i < n && !status; i++) {
        packed_segment segment = self->segments[i];
        if (segment.key >= n_keys || segment.nbytes == 0 || segment.nbytes > left)
            status = PACKED_MALFORMED;
        else if (!region_has(held[segment.key], segment.address, segment.nbytes))
            status = REGION_OUT_OF_RANGE;
        else
            left -= segment.nbytes;
    }
    if (!status && left)
        status = PACKED_MALFORMED;
    char *data = slot->data;
    for (uint32_t i = 0; i < n && !status; i++) {
        char *memory = (char *)(uintptr_t)self->segments[i].address;
        size_t nbytes = self->segments[i].nbytes;
        if (put) {
            copy_past_cache(memory, data, nbytes);
        } else {
            if (i + 1 < n)
                packed_prefetch((const char *)(uintptr_t)self->segments[i + 1].address, self->segments[i + 1].nbytes);
            memcpy(data, memory, nbytes);
        }
        data += nbytes;
    }
    if (put)
        past_cache_done();
    if (!status)
        __atomic_fetch_add(put ? &server->written_nbytes : &server->read_nbytes, data - slot->data, __ATOMIC_RELAXED);
    packed_release(server, held, n_keys);
    return status;
}

/* Leaves the core on which the asking side runs: whoever is woken is put near who woke it, and there both would stay for
   milliseconds, each waiting for the other, though another core is idle. */
static void packed_part_cores(packed_thread *self, uint32_t cpu) {
    cpu_set_t allowed, others;
    if (cpu != (uint32_t)sched_getcpu() || cpu >= CPU_SETSIZE)
        return;
    int64_t now = packed_clock();
    if (now - self->parted_ns < PACKED_PART_NS || sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    self->parted_ns = now;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
}

/* Takes the next steps of a lane; returns how many there were. */
static int packed_turn(packed_thread *self, packed_client *client) {
    packed_lane *lane = &client->shared->lanes[self->lane];
    int steps = 0;
    while (steps < PACKED_TURN && !__atomic_load_n(&client->closed, __ATOMIC_RELAXED)) {
        packed_slot *slot = &lane->slots[client->at[self->lane] % PACKED_SLOTS];
        uint32_t state = packed_load(&slot->state);
        if (state == SLOT_POSTED && packed_change(&slot->state, SLOT_POSTED, SLOT_BUSY)) {
            packed_part_cores(self, slot->cpu);
            slot->status = packed_serve(self, slot);
            if (!packed_change(&slot->state, SLOT_BUSY, SLOT_DONE))
                packed_store(&slot->state, SLOT_FREE);
        } else if (state == SLOT_RETRACTED) {
            packed_store(&slot->state, SLOT_FREE);
        } else if (state != SLOT_POSTED) {
            break;
        } else {
            continue;
        }
        client->at[self->lane]++;
        steps++;
        packed_answer(lane);
    }
    return steps;
}

static int packed_waits(const packed_thread *self, packed_client *client) {
    uint32_t state = packed_load(&client->shared->lanes[self->lane].slots[client->at[self->lane] % PACKED_SLOTS].state);
    return state == SLOT_POSTED || state == SLOT_RETRACTED;
}

/* Gives each client whose slots wait a turn. Returns 1 when there were any, 0 when an op is going on somewhere, -1 when none is. */
static int packed_round(packed_thread *self) {
    nx_packed *server = self->server;
    int result = -1;
    pthread_mutex_lock(&server->lock);
    for (int i = 0; i < server->n_clients; i++) {
        packed_client *client = server->clients[i];
        if (!client || client->closed)
            continue;
        if (packed_waits(self, client)) {
            client->serving++;
            pthread_mutex_unlock(&server->lock);
            packed_turn(self, client);
            result = 1;
            pthread_mutex_lock(&server->lock);
            if (--client->serving == 0 && client->closed)
                pthread_cond_broadcast(&server->quiet);
        } else if (result < 0 && __atomic_load_n(&client->shared->lanes[self->lane].active, __ATOMIC_RELAXED)) {
            result = 0;
        }
    }
    pthread_mutex_unlock(&server->lock);
    return result;
}

static void *packed_run(void *argument) {
    packed_thread *self = argument;
    nx_packed *server = self->server;
    packed_bell *bell = &server->directory->bells[self->lane];
    int64_t last = 0;
    while (!packed_load(&server->stop)) {
        int found = packed_round(self);
        if (found > 0) {
            last = 0;
            continue;
        }
        if (found == 0) {
            int64_t now = packed_clock();
            last = last ? last : now;
            if (now - last < PACKED_SPIN_NS) {
                packed_pause();
                continue;
            }
        }
        __atomic_store_n(&bell->sleeping, 1, __ATOMIC_SEQ_CST);
        uint32_t word = __atomic_load_n(&bell->word, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (packed_round(self) <= 0 && !packed_load(&server->stop))
            packed_sleep(&bell->word, word, 0);
        packed_store(&bell->sleeping, 0);
        last = 0;
    }
    return NULL;
}

/* What Python calls. */

/* Tells a peer's ops that nobody serves them any more. */
static void packed_close_to(nx_packed *server, packed_client *client) {
    packed_store(&client->closed, 1);
    packed_store(&client->shared->closed, 1);
    for (int lane = 0; lane < server->n_threads; lane++)
        packed_answer(&client->shared->lanes[lane]);
}

static void packed_free_client(nx_packed *server, packed_client *client) {
    munmap(client->shared, packed_channel_nbytes((uint32_t)server->n_threads));
    close(client->fd);
    free(client);
}

/* Returns NULL, with `errno` set, where there is no such file or memory; threads are started for the first peer that is accepted. */
nx_packed *nx_packed_open(int threads, const uint8_t *nonce) {
    nx_packed *server = calloc(1, sizeof *server);
    packed_thread *all = calloc((size_t)threads, sizeof *all);
    int fd = packed_new_file(sizeof(packed_directory));
    packed_directory *directory = fd < 0 ? NULL : packed_map(fd, sizeof *directory);
    if (!server || !all || !directory) {
        if (fd >= 0)
            close(fd);
        free(server);
        free(all);
        return NULL;
    }
    server->fd = fd;
    server->n_threads = threads;
    server->directory = directory;
    server->threads = all;
    pthread_mutex_init(&server->lock, NULL);
    pthread_mutex_init(&server->regions.lock, NULL);
    pthread_cond_init(&server->quiet, NULL);
    directory->n_threads = (uint32_t)threads;
    memcpy(directory->nonce, nonce, 16);
    packed_store(&directory->magic, PACKED_MAGIC);
    return server;
}

int nx_packed_fd(nx_packed *server) { return server->fd; }

/* How many bytes peers have had read from our memory and written to it. */
void nx_packed_served(nx_packed *server, int64_t *nbytes) {
    nbytes[0] = __atomic_load_n(&server->read_nbytes, __ATOMIC_RELAXED);
    nbytes[1] = __atomic_load_n(&server->written_nbytes, __ATOMIC_RELAXED);
}

/* Ends the threads and frees everything; peers that ask for more are told that nobody serves. */
void nx_packed_close(nx_packed *server) {
    packed_store(&server->stop, 1);
    for (int i = 0; i < server->n_started; i++) {
        packed_ring(&server->directory->bells[i]);
        pthread_join(server->threads[i].thread, NULL);
    }
    for (int i = 0; i < server->n_clients; i++) {
        packed_client *client = server->clients[i];
        if (!client)
            continue;
        packed_close_to(server, client);
        packed_free_client(server, client);
    }
    regions_clear(&server->regions);
    munmap(server->directory, sizeof *server->directory);
    close(server->fd);
    pthread_cond_destroy(&server->quiet);
    pthread_mutex_destroy(&server->regions.lock);
    pthread_mutex_destroy(&server->lock);
    free(server->threads);
    free(server);
}

int nx_packed_register(nx_packed *server, uint64_t key, int64_t address, int64_t nbytes, int readonly) {
    return regions_add(&server->regions, key, address, nbytes, readonly, 0);
}

/* Refuses the region from here on. Returns 0 once no copy touches it; without `wait` -EBUSY when one still does. */
int nx_packed_unregister(nx_packed *server, uint64_t key, int wait) {
    pthread_mutex_lock(&server->lock);
    int status;
    /* A copy that ends tells of it under the lock: it cannot be missed. */
    while ((status = regions_remove(&server->regions, key, 1)) == -EBUSY && wait)
        pthread_cond_wait(&server->quiet, &server->lock);
    pthread_mutex_unlock(&server->lock);
    return status == -ENOENT ? 0 : status;
}

static int packed_start(nx_packed *server) {
    sigset_t all, before;
    sigfillset(&all);
    /* Signals are for Python's main thread. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    while (server->n_started < server->n_threads && !failed) {
        packed_thread *self = &server->threads[server->n_started];
        self->server = server;
        self->lane = (uint32_t)server->n_started;
        failed = pthread_create(&self->thread, NULL, packed_run, self);
        if (!failed) {
            pthread_setname_np(self->thread, "nixl-packed");
            server->n_started++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -failed;
}

/* Serves the peer that calls itself `identity` (not 0) from here on. Returns 0 or -errno. */
int nx_packed_accept(nx_packed *server, uint64_t identity) {
    int status = packed_start(server);
    packed_client *client = status ? NULL : calloc(1, sizeof *client);
    if (!client)
        return status ? status : -ENOMEM;
    size_t nbytes = packed_channel_nbytes((uint32_t)server->n_threads);
    client->identity = identity;
    client->fd = packed_new_file(nbytes);
    client->shared = client->fd < 0 ? NULL : packed_map(client->fd, nbytes);
    if (!client->shared) {
        status = client->fd < 0 ? client->fd : -errno;
        if (client->fd >= 0)
            close(client->fd);
        free(client);
        return status;
    }
    client->shared->identity = identity;
    client->shared->n_lanes = (uint32_t)server->n_threads;
    memcpy(client->shared->nonce, server->directory->nonce, 16);
    client->shared->magic = PACKED_MAGIC;
    int at = 0;
    pthread_mutex_lock(&server->lock);
    while (at < server->n_clients && server->clients[at])
        at++;
    if (at < PACKED_PEERS) {
        server->n_clients += at == server->n_clients;
        server->clients[at] = client;
        client->entry = &server->directory->entries[at];
        client->entry->fd = client->fd;
        packed_store(&client->entry->identity, identity);
    }
    pthread_mutex_unlock(&server->lock);
    if (at == PACKED_PEERS)
        packed_free_client(server, client);
    return at == PACKED_PEERS ? -EMFILE : 0;
}

/* Serves a peer no longer. Returns 0 once none of its requests is being served; without `wait` -EBUSY when one still is. */
int nx_packed_dismiss(nx_packed *server, uint64_t identity, int wait) {
    pthread_mutex_lock(&server->lock);
    int at = 0;
    while (at < server->n_clients && !(server->clients[at] && server->clients[at]->identity == identity))
        at++;
    packed_client *client = at < server->n_clients ? server->clients[at] : NULL;
    if (client && !client->closed)
        packed_close_to(server, client);
    while (client && client->serving && wait)
        pthread_cond_wait(&server->quiet, &server->lock);
    int busy = client && client->serving;
    if (client && !busy) {
        packed_store(&client->entry->identity, 0);
        server->clients[at] = NULL;
    }
    pthread_mutex_unlock(&server->lock);
    if (client && !busy)
        packed_free_client(server, client);
    return busy ? -EBUSY : 0;
}
