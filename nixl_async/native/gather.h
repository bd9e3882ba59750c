void nx_describe(const int64_t *src, int64_t src_move, const int64_t *dst, int64_t dst_move, const int64_t *lengths, int64_t n, int far,
                 int64_t low, int shift, int in_order, int64_t *to, uint32_t *starts);
void nx_sizes(const int64_t *lengths, int64_t n, int64_t smallest, int64_t allowed, int64_t *found);
void nx_cut(const int64_t *src, int64_t src_move, const int64_t *dst, int64_t dst_move, const int64_t *lengths, int64_t n,
            int64_t piece, int64_t *src_to, int64_t *dst_to, int64_t *lengths_to);
