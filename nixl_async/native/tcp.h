typedef struct nx_tcp nx_tcp;
typedef struct nx_tcp_stream nx_tcp_stream;

nx_tcp *nx_tcp_open(int threads, int event_fd);
void nx_tcp_close(nx_tcp *engine);
int nx_tcp_listen(nx_tcp *engine, int fd);

int64_t nx_tcp_invite(nx_tcp *engine, const uint8_t *identity, int64_t n_identity, uint8_t *token);
int nx_tcp_register(nx_tcp *engine, uint64_t key, int64_t address, int64_t nbytes, int readonly, uint64_t guest);
int nx_tcp_unregister(nx_tcp *engine, uint64_t key, int64_t id);
int nx_tcp_cut_region(nx_tcp *engine, uint64_t key);

nx_tcp_stream *nx_tcp_adopt(nx_tcp *engine, int fd, int64_t id, int express);
void nx_tcp_forget(nx_tcp_stream *stream);
int nx_tcp_submit(nx_tcp_stream *stream, int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                  const int64_t *lengths, const int64_t *index, int64_t n_keys, const uint8_t *keys, int64_t nbytes);
int64_t nx_tcp_now(nx_tcp_stream *stream, int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                   const int64_t *lengths, const int64_t *index, int64_t n_keys, const uint8_t *keys, int64_t nbytes,
                   int64_t spin_ns);
int nx_tcp_pump(nx_tcp_stream *stream);
int nx_tcp_cancel(nx_tcp_stream *stream, int64_t id);
int nx_tcp_drop(nx_tcp_stream *stream);
int nx_tcp_drop_accepted(nx_tcp *engine, const uint8_t *identity, int64_t n_identity, int64_t id, int dismiss);
int nx_tcp_completions(nx_tcp *engine, int64_t *ids, int64_t *statuses, int max);
void nx_tcp_served(nx_tcp *engine, int64_t *nbytes);
