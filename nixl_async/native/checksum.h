/* CRC-64/NVME of many blocks by one call, so that the interpreter's lock is let go once. */

/* Continues values[i], the checksum of what comes before (0: nothing), over block i: n_ranges ranges of lengths[i * n_ranges + j]
   bytes at addresses[i * n_ranges + j]. */
void nx_crc64nvme(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values);

/* The same without the instructions that only some processors have; for tests. */
void nx_crc64nvme_plain(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values);

/* Lets one thread at a time write. */
typedef struct nx_turn nx_turn;
nx_turn *nx_turn_new(void);
void nx_turn_free(nx_turn *turn);

/* Reads blocks out of the page cache, or with a `turn` writes them into it, and continues their checksums in values, some at a time
   while the processor's cache holds their bytes. Block i is at offsets[i] of file fds[i] and in its ranges. done[i] becomes 1 if it
   was moved whole; one that is not cached, or met an error, stays 0, with what was to be filled and its value undefined. Threads
   with the same `next`, which begins at 0, share the work; all end soon once *stop is not 0. */
void nx_crc64nvme_move(nx_turn *turn, const int32_t *fds, const int64_t *offsets, const int64_t *addresses, const int64_t *lengths,
                       int64_t n_blocks, int64_t n_ranges, uint64_t *values, uint8_t *done, int64_t *next, const int32_t *stop);
