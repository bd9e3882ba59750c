/* What the copy kernel of CUDA devices is told: addresses and lengths, one array behind the other in pinned memory.

   Where one side is in the order of its addresses the device copies it faster (`Far` of cuda_kernels.py). Few entries are put in the
   order of the areas that they lie in here; of many the areas are counted, and the device puts them in order (`nixl_order`). */
#include <stdint.h>
#include <string.h>

#define NX_AREAS 4096

/* Writes n sources and n destinations, all moved by so much, to `to`, and their lengths behind if `lengths` is not NULL. With `far`, 1
   for the sources and 2 for the destinations, starts[i] becomes the number of entries whose address there lies in areas before i:
   areas of 2^shift bytes, which begin at `low` and are more than enough. With `in_order`, the entries are written in the order of
   these areas, and `starts` is worth nothing. */
void nx_describe(const int64_t *src, int64_t src_move, const int64_t *dst, int64_t dst_move, const int64_t *lengths, int64_t n, int far,
                 int64_t low, int shift, int in_order, int64_t *to, uint32_t *starts) {
    int64_t move = far == 2 ? dst_move - low : src_move - low;
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
            if (lengths)
                to[2 * n + at] = lengths[i];
        }
        return;
    }
    for (int64_t i = 0; i < n; i++)
        to[i] = src[i] + src_move;
    for (int64_t i = 0; i < n; i++)
        to[n + i] = dst[i] + dst_move;
    if (lengths)
        memcpy(to + 2 * n, lengths, (size_t)n * sizeof *to);
}

/* Writes to `found` into pieces of how many bytes n segments are best cut, into how many pieces, and whether these are all of one
   size: then a piece is as long as the shortest segment, of which all others are multiples, as they are where some pages follow each
   other. Else the size is `smallest`, doubled until there are at most `allowed` pieces. */
void nx_sizes(const int64_t *lengths, int64_t n, int64_t smallest, int64_t allowed, int64_t *found) {
    int64_t shortest = lengths[0], total = 0;
    for (int64_t i = 0; i < n; i++) {
        shortest = lengths[i] < shortest ? lengths[i] : shortest;
        total += lengths[i];
    }
    int same = total / shortest <= allowed;
    for (int64_t i = 0; same && i < n; i++)
        same = lengths[i] == shortest || lengths[i] % shortest == 0;
    found[0] = shortest;
    found[1] = total / shortest;
    found[2] = same;
    for (int64_t piece = smallest; !same; piece *= 2) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++)
            count += (lengths[i] + piece - 1) / piece;
        if (count <= allowed) {
            found[0] = piece;
            found[1] = count;
            return;
        }
    }
}

/* Cuts n segments into pieces of `piece` bytes, the last of each shorter, and writes the pieces' sources and destinations, moved by so
   much, and, with `lengths_to`, their lengths. */
void nx_cut(const int64_t *src, int64_t src_move, const int64_t *dst, int64_t dst_move, const int64_t *lengths, int64_t n,
            int64_t piece, int64_t *src_to, int64_t *dst_to, int64_t *lengths_to) {
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t done = 0; done < lengths[i]; done += piece, at++) {
            src_to[at] = src[i] + src_move + done;
            dst_to[at] = dst[i] + dst_move + done;
            if (lengths_to)
                lengths_to[at] = lengths[i] - done < piece ? lengths[i] - done : piece;
        }
}
