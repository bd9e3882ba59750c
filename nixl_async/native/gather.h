int nx_describe(const int64_t *src, int64_t src_move, const int64_t *dst, int64_t dst_move, const int64_t *lengths, int64_t n,
                int same, int far, int64_t low, int shift, int in_order, int64_t *to, uint32_t *starts);
