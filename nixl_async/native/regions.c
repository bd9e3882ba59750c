/* A table of registered memory that peers' requests are checked against. Included by the engines that serve such requests.

   A request holds every region that it names before the first byte moves, and lets go of them after the last. A region that is
   removed is refused from then on; it is gone once nothing holds it. One that was added for a guest is there for no other. */
#ifndef NX_REGIONS_C
#define NX_REGIONS_C
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define REGION_BUCKETS 256

/* Why a request is refused. The numbers travel between peers. */
enum { REGION_UNKNOWN = 1, REGION_OUT_OF_RANGE, REGION_READ_ONLY };

typedef struct nx_region {
    struct nx_region *next;
    uint64_t key, address, nbytes;
    int readonly, gone;
    uint64_t guest; /* 0: any */
    int64_t refs, gone_id;
} nx_region;

typedef struct {
    pthread_mutex_t lock;
    nx_region *buckets[REGION_BUCKETS];
} nx_region_table;

static nx_region **regions_find(nx_region_table *table, uint64_t key) {
    nx_region **place = &table->buckets[key % REGION_BUCKETS];
    while (*place && (*place)->key != key)
        place = &(*place)->next;
    return place;
}

/* Returns 0, -EEXIST or -ENOMEM. */
static int regions_add(nx_region_table *table, uint64_t key, int64_t address, int64_t nbytes, int readonly, uint64_t guest) {
    nx_region *region = calloc(1, sizeof *region);
    if (!region)
        return -ENOMEM;
    region->key = key;
    region->address = (uint64_t)address;
    region->nbytes = (uint64_t)nbytes;
    region->readonly = readonly;
    region->guest = guest;
    pthread_mutex_lock(&table->lock);
    nx_region **place = regions_find(table, key);
    int taken = *place != NULL;
    if (!taken)
        *place = region;
    pthread_mutex_unlock(&table->lock);
    if (taken)
        free(region);
    return taken ? -EEXIST : 0;
}

/* Refuses the region from here on. Returns 0 when nothing held it, -ENOENT when it is not there, and -EBUSY when it is held:
   then the release that ends that returns `id`, which must not be 0. */
static int regions_remove(nx_region_table *table, uint64_t key, int64_t id) {
    pthread_mutex_lock(&table->lock);
    nx_region **place = regions_find(table, key), *region = *place;
    int quiet = region && region->refs == 0;
    if (quiet) {
        *place = region->next;
    } else if (region) {
        region->gone = 1;
        region->gone_id = id;
    }
    pthread_mutex_unlock(&table->lock);
    if (quiet)
        free(region);
    return quiet ? 0 : region ? -EBUSY : -ENOENT;
}

/* Holds the regions of `n` keys for reading, or for writing, by `guest`; returns 0, or why not: then none is held. */
static int regions_hold(nx_region_table *table, uint64_t guest, const uint64_t *keys, uint32_t n, int writing,
                        nx_region **held) {
    int status = 0;
    uint32_t i = 0;
    pthread_mutex_lock(&table->lock);
    for (; i < n && !status; i++) {
        nx_region *region = *regions_find(table, keys[i]);
        if (!region || region->gone || (region->guest && region->guest != guest)) {
            status = REGION_UNKNOWN;
        } else if (writing && region->readonly) {
            status = REGION_READ_ONLY;
        } else {
            region->refs++;
            held[i] = region;
        }
    }
    /* None of them can be gone: the lock was not let go of. */
    if (status)
        for (i--; i > 0; i--)
            held[i - 1]->refs--;
    pthread_mutex_unlock(&table->lock);
    return status;
}

/* Lets go of a region; returns the id that waits for it to be gone, or 0. */
static int64_t regions_release(nx_region_table *table, nx_region *region) {
    pthread_mutex_lock(&table->lock);
    int quiet = --region->refs == 0 && region->gone;
    if (quiet)
        *regions_find(table, region->key) = region->next;
    pthread_mutex_unlock(&table->lock);
    int64_t id = quiet ? region->gone_id : 0;
    if (quiet)
        free(region);
    return id;
}

/* Whether a range lies within a region; no sum of the two can overflow. */
static int region_has(const nx_region *region, uint64_t address, uint64_t nbytes) {
    return address >= region->address && nbytes <= region->nbytes && address - region->address <= region->nbytes - nbytes;
}

static void regions_clear(nx_region_table *table) {
    for (int i = 0; i < REGION_BUCKETS; i++)
        while (table->buckets[i]) {
            nx_region *region = table->buckets[i];
            table->buckets[i] = region->next;
            free(region);
        }
}
#endif
