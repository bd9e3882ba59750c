typedef struct {
    const int64_t *addresses, *lengths, *strides, *ends;
    int64_t n_runs, n;
} nx_places;
int64_t nx_pair(const nx_places *near, const void *near_chosen, const int64_t *near_index, const nx_places *far,
                const void *far_chosen, const int64_t *far_index, int near_width, int far_width, int64_t n, int64_t *out);
