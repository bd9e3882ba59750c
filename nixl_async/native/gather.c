/* What the copy kernel of CUDA devices is told: addresses and lengths, one array behind the other in pinned memory.

   Where one side is in the order of its addresses the device copies it faster (`Far` of cuda_kernels.py). Few entries are put in the
   order of the areas that they lie in here; of many the areas are counted, and the device puts them in order (`nixl_order`). */
#include <stdint.h>
#include <string.h>

#define NX_AREAS 4096

/* Writes n sources and n destinations, all moved by so much, to `to`. With `same`, the lengths are to be all one: returns 0 if they are
   not, and what it has written is worth nothing; without, they are written behind. With `far`, 1 for the sources and 2 for the
   destinations, starts[i] becomes the number of entries whose address there lies in areas before i: areas of 2^shift bytes, which
   begin at `low` and are more than enough. With `in_order`, the entries are written in the order of these areas, and `starts` is
   worth nothing. */
int nx_describe(const int64_t *src, int64_t src_move, const int64_t *dst, int64_t dst_move, const int64_t *lengths, int64_t n,
                int same, int far, int64_t low, int shift, int in_order, int64_t *to, uint32_t *starts) {
    int64_t different = 0, move = far == 2 ? dst_move - low : src_move - low;
    const int64_t *by = far == 2 ? dst : src;
    uint32_t sum = 0;
    if (far) {
        memset(starts, 0, NX_AREAS * sizeof *starts);
        for (int64_t i = 0; i < n; i++)
            starts[((uint64_t)(by[i] + move) >> shift) % NX_AREAS]++;
        for (int area = 0; area < NX_AREAS; area++) {
            uint32_t count = starts[area];
            starts[area] = sum;
            sum += count;
        }
    }
    if (far && in_order) {
        for (int64_t i = 0; i < n; i++) {
            int64_t at = starts[((uint64_t)(by[i] + move) >> shift) % NX_AREAS]++;
            to[at] = src[i] + src_move;
            to[n + at] = dst[i] + dst_move;
            if (!same)
                to[2 * n + at] = lengths[i];
            different |= lengths[i] ^ lengths[0];
        }
        return !same || !different;
    }
    /* In one pass: the arrays are larger than the caches near by. */
    for (int64_t i = 0; i < n; i++) {
        to[i] = src[i] + src_move;
        to[n + i] = dst[i] + dst_move;
        different |= lengths[i] ^ lengths[0];
    }
    if (!same)
        memcpy(to + 2 * n, lengths, (size_t)n * sizeof *to);
    return !same || !different;
}
