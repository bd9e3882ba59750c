int nx_page_indices(const void *from, int width, int64_t n, int64_t limit, int32_t *to);
int64_t nx_pair_pages(const void *a, int a_width, int64_t a_stride, int64_t a_base, const void *b, int b_width, int64_t b_stride,
                      int64_t b_base, int64_t n, int64_t nbytes, int64_t *a_to, int64_t *b_to, int64_t *lengths);
