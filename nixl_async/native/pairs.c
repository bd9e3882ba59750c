/* Chooses places of two prepared lists, pairs them and joins neighbours, in one pass: for the drop-in (nixl_async.compat). */
#include <stdint.h>

typedef struct {
    const int64_t *addresses, *lengths, *strides, *ends;
    int64_t n_runs, n;
} nx_places;

static int64_t chosen_at(const void *chosen, int width, int64_t i) {
    if (!chosen)
        return i;
    return width == 4 ? ((const int32_t *)chosen)[i] : ((const int64_t *)chosen)[i];
}

/* The run that place `at` is in: `ends[r]` is how many places there are up to the end of run r. */
static int64_t run_of(const nx_places *places, int64_t at) {
    int64_t low = 0, high = places->n_runs - 1;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (places->ends[middle] > at)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static int64_t locate(const nx_places *places, int64_t at, int64_t *address) {
    if (!places->ends) {
        *address = places->addresses[at];
        return at;
    }
    int64_t run = run_of(places, at);
    *address = places->addresses[run] + (at - (run ? places->ends[run - 1] : 0)) * places->strides[run];
    return run;
}

/* Pairs n chosen places (`chosen` NULL: all, in order) of `near` with as many of `far`. Writes to `out` five columns of n: addresses
   here and there, lengths, and, where there are such, the index of the region here and there of each segment; behind them the bytes in
   all. Segments that go on where the one before ends, on both sides and in the same regions, are joined; empty ones are left out.
   Returns the number of segments; or -1 or -2 if an index here or there, and -3 if a pair's lengths, do not do; out[0] says which. */
int64_t nx_pair(const nx_places *near, const void *near_chosen, const int64_t *near_index, const nx_places *far,
                const void *far_chosen, const int64_t *far_index, int near_width, int far_width, int64_t n, int64_t *out) {
    int64_t *here = out, *there = out + n, *lengths = out + 2 * n, *regions = out + 3 * n, *far_regions = out + 4 * n;
    int64_t count = 0, total = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t a = chosen_at(near_chosen, near_width, i), b = chosen_at(far_chosen, far_width, i), a_address, b_address;
        if (a < 0 || a >= near->n || b < 0 || b >= far->n) {
            out[0] = i;
            return a < 0 || a >= near->n ? -1 : -2;
        }
        a = locate(near, a, &a_address);
        b = locate(far, b, &b_address);
        int64_t length = near->lengths[a];
        if (length != far->lengths[b]) {
            out[0] = i;
            return -3;
        }
        if (!length)
            continue;
        int64_t region = near_index ? near_index[a] : 0, far_region = far_index ? far_index[b] : 0;
        total += length;
        int64_t last = count - 1;
        if (count && here[last] + lengths[last] == a_address && there[last] + lengths[last] == b_address &&
            regions[last] == region && far_regions[last] == far_region) {
            lengths[last] += length;
            continue;
        }
        here[count] = a_address;
        there[count] = b_address;
        lengths[count] = length;
        regions[count] = region;
        far_regions[count] = far_region;
        count++;
    }
    out[5 * n] = total;
    return count;
}
