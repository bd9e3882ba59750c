/* Reading and writing files by lists of segments: io_uring where the kernel allows it, preadv and pwritev where not. */

typedef struct nx_ring nx_ring;

/* Opens a ring for `depth` requests at once; NULL and *error = errno if there is no io_uring. Only the thread that opened it uses it. */
nx_ring *nx_ring_open(unsigned int depth, int *error);
void nx_ring_close(nx_ring *ring);

/* Asks which alignment direct I/O on fd needs of memory and of offsets, in bytes; 4096 if the kernel does not say. */
void nx_file_align(int fd, int64_t *memory, int64_t *offset);

/* Reads (put == 0) or writes n segments: lengths[i] bytes at offsets[i] of fds[i], from or to addresses[i]. direct_fds[i] >= 0 goes
   past the page cache. Returns 0; -ECANCELED when *stop became nonzero; -ENODATA when a file ended too soon; -errno. Nothing
   moves any more when it returns. *failed is the segment that the error belongs to. ring may be NULL. */
int nx_file_run(nx_ring *ring, int put, const int32_t *fds, const int32_t *direct_fds, const int64_t *offsets,
                const int64_t *addresses, const int64_t *lengths, int64_t n, int64_t memory_align, int64_t offset_align,
                const int32_t *stop, int64_t *failed);

/* Reads n segments out of the page cache without ever waiting for a device; 1 if all of it was there, else 0. */
int nx_file_cached(int fd, const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n);

typedef struct nx_lanes nx_lanes;

/* Starts n threads (fewer if there are no more) that work on jobs, with a ring for `depth` requests each if `uring`; NULL if none
   starts. event_fd becomes readable when a job has ended. Close when no job is left. */
nx_lanes *nx_lanes_open(int n, int uring, unsigned int depth, int event_fd);
void nx_lanes_close(nx_lanes *lanes);

/* Has up to `ways` threads work on n segments of nbytes bytes in all; the arrays must live until the job has ended. 0 or -ENOMEM. */
int nx_lanes_submit(nx_lanes *lanes, int64_t id, int ways, int put, const int32_t *fds, const int32_t *direct_fds,
                    const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n, int64_t nbytes,
                    int64_t memory_align, int64_t offset_align);

/* Has up to `ways` threads copy n segments of memory, sources[i] to targets[i]; the arrays as above. */
int nx_lanes_submit_copy(nx_lanes *lanes, int64_t id, int ways, const int64_t *targets, const int64_t *sources,
                         const int64_t *lengths, int64_t n);

/* Has up to `ways` threads do what nx_crc64nvme_move does; the arrays, `turn` among them, as above. */
int nx_lanes_submit_summed(nx_lanes *lanes, int64_t id, int ways, nx_turn *turn, const int32_t *fds, const int64_t *offsets,
                           const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges,
                           uint64_t *values, uint8_t *moved);

/* Makes a job end soon, with -ECANCELED unless it was done before. */
void nx_lanes_cancel(nx_lanes *lanes, int64_t id);

/* Takes the jobs that have ended, at most max, and what nx_file_run would say of each. Call it until it returns less than max. */
int nx_lanes_done(nx_lanes *lanes, int64_t *ids, int64_t *errors, int64_t *failed, int max);
