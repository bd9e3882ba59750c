typedef struct nx_ucx nx_ucx;
typedef struct nx_ucx_ep nx_ucx_ep;

nx_ucx *nx_ucx_open(uintptr_t context, uintptr_t worker, int event_fd, char *why, int64_t n_why, uint64_t identity);
void nx_ucx_close(nx_ucx *engine);
int nx_ucx_address(nx_ucx *engine, uint8_t *out, int64_t room, int64_t *n);

int nx_ucx_takes_cuda(nx_ucx *engine);
int nx_ucx_use_cuda(nx_ucx *engine, uintptr_t context);

int nx_ucx_map(nx_ucx *engine, int64_t address, int64_t nbytes, uint64_t token, uintptr_t context, void **memory, uint8_t *key,
               int64_t room, int64_t *n);
int nx_ucx_unmap(nx_ucx *engine, void *memory, uint64_t token);

nx_ucx_ep *nx_ucx_connect(nx_ucx *engine, const uint8_t *address, int64_t id, uint64_t identity, int *status);
int nx_ucx_disconnect(nx_ucx_ep *ep);
int nx_ucx_fail(nx_ucx_ep *ep);
int nx_ucx_settle(nx_ucx *engine, int64_t id);
void nx_ucx_forget(nx_ucx_ep *ep);
void *nx_ucx_rkey(nx_ucx_ep *ep, const uint8_t *key, uintptr_t context, int *status);
void nx_ucx_rkey_free(void *rkey);

int nx_ucx_submit(nx_ucx_ep *ep, int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                  const int64_t *lengths, const int64_t *index, void **rkeys, const uint64_t *tokens, int vram, void *memory);
int nx_ucx_cancel(nx_ucx_ep *ep, int64_t id);
int nx_ucx_send(nx_ucx_ep *ep, int64_t id, const uint8_t *data, int64_t nbytes);
int64_t nx_ucx_receive(nx_ucx *engine, uint8_t *data, int64_t room);
int nx_ucx_completions(nx_ucx *engine, int64_t *ids, int64_t *statuses, int max);
const char *nx_ucx_text(int status);

/* Whether the peer has said that it takes small pages packed into messages; until then all is one-sided. */
int nx_ucx_packs(nx_ucx_ep *ep);
int nx_ucx_lanes(nx_ucx_ep *ep, uint8_t *out, int64_t room, int64_t *n);
int nx_ucx_library(uint8_t *out, int64_t room, int64_t *n);
