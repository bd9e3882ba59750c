/* CRC-64/NVME of many blocks by one call, so that the interpreter's lock is let go once. */

/* Continues values[i], the checksum of what comes before (0: nothing), over block i: n_ranges ranges of lengths[i * n_ranges + j]
   bytes at addresses[i * n_ranges + j]. */
void nx_crc64nvme(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values);

/* The same without the instructions that only some processors have; for tests. */
void nx_crc64nvme_plain(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values);
