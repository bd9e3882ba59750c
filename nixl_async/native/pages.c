/* Lists of pages: their indices checked, and two lists paired with neighbours joined, in one pass each (nixl_async.descriptors). */
#include <stdint.h>

/* Copies n indices of `width` bytes as 32-bit ones; returns 0 if one of them is negative or not less than `limit`: at most 2^31. */
int nx_page_indices(const void *from, int width, int64_t n, int64_t limit, int32_t *to) {
    if (width == 4) {
        uint32_t largest = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t index = (uint32_t)((const int32_t *)from)[i];
            to[i] = (int32_t)index;
            largest = index > largest ? index : largest;
        }
        return !n || largest < (uint64_t)limit;
    }
    uint64_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t index = (uint64_t)((const int64_t *)from)[i];
        to[i] = (int32_t)index;
        largest = index > largest ? index : largest;
    }
    return !n || largest < (uint64_t)limit;
}

/* Pairs n places of one side with as many of the other, each of `nbytes` bytes: place i is at base + stride * places[i], where
   `places` has 32-bit (`width` 4) or 64-bit numbers. Writes the addresses of segments: places that go on where the one before ends,
   on both sides, are joined. Returns how many segments there are; only if they are fewer than n, `lengths` has their lengths. */
int64_t nx_pair_pages(const void *a, int a_width, int64_t a_stride, int64_t a_base, const void *b, int b_width, int64_t b_stride,
                      int64_t b_base, int64_t n, int64_t nbytes, int64_t *a_to, int64_t *b_to, int64_t *lengths) {
    int64_t count = 0, a_end = 0, b_end = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t here = a_base + a_stride * (a_width == 4 ? ((const int32_t *)a)[i] : ((const int64_t *)a)[i]);
        int64_t there = b_base + b_stride * (b_width == 4 ? ((const int32_t *)b)[i] : ((const int64_t *)b)[i]);
        if (i && here == a_end && there == b_end) {
            if (count == i)
                for (int64_t k = 0; k < count; k++)
                    lengths[k] = nbytes;
            lengths[count - 1] += nbytes;
        } else {
            a_to[count] = here;
            b_to[count] = there;
            if (count < i)
                lengths[count] = nbytes;
            count++;
        }
        a_end = here + nbytes;
        b_end = there + nbytes;
    }
    return count;
}
