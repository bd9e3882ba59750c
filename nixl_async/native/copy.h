int64_t nx_copy_segments(const int64_t *dst, const int64_t *src, const int64_t *lengths, int64_t n, const int32_t *stop);
int nx_process_vm(int pid, int put, const int64_t *local, const int64_t *remote, const int64_t *lengths, int64_t n,
                  const int32_t *stop, int64_t *spent_ns);
