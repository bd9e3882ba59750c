typedef struct nx_packed nx_packed;
typedef struct nx_packed_peer nx_packed_peer;

nx_packed *nx_packed_open(int threads, const uint8_t *nonce);
int nx_packed_fd(nx_packed *server);
void nx_packed_served(nx_packed *server, int64_t *nbytes);
void nx_packed_close(nx_packed *server);
int nx_packed_register(nx_packed *server, uint64_t key, int64_t address, int64_t nbytes, int readonly);
int nx_packed_unregister(nx_packed *server, uint64_t key, int wait);
int nx_packed_accept(nx_packed *server, uint64_t identity);
int nx_packed_dismiss(nx_packed *server, uint64_t identity, int wait);

nx_packed_peer *nx_packed_dial(int pid, int fd, const uint8_t *nonce, uint64_t identity, int *error);
int nx_packed_ready(nx_packed_peer *peer);
int nx_packed_move(nx_packed_peer *peer, int put, int64_t n, const int64_t *local, const int64_t *remote, const int64_t *lengths,
                   const int64_t *index, const uint8_t *keys, const int32_t *stop, int64_t stall_ns,
                   int64_t *spent_ns);
void nx_packed_wake(nx_packed_peer *peer);
void nx_packed_lost(nx_packed_peer *peer);
void nx_packed_hangup(nx_packed_peer *peer);
