/* GET requests over plain HTTP/1.1 that are answered in the usual way: many connections, one call for all that are ready. */

typedef struct nx_http nx_http;

/* NULL if there is no memory or no descriptor left. */
nx_http *nx_http_open(void);
void nx_http_close(nx_http *engine);

/* A descriptor that is readable when nx_http_step has something to do. */
int nx_http_fd(nx_http *engine);

/* Watches an idle non-blocking socket, which stays the caller's; returns its slot, or -errno. */
int nx_http_adopt(nx_http *engine, int fd);

/* Forgets a socket, whatever it is doing: no byte moves on its account any more. */
void nx_http_release(nx_http *engine, int slot);

/* Sends a request on an idle socket; the answer's `nbytes` bytes go to n segments. Returns 0; 1 if the caller must go on by
   itself, as after NX_HTTP_STOPPED; -ENOMEM. `head` is copied, the segments are the caller's until the request is over. */
int nx_http_get(nx_http *engine, int slot, const char *head, int64_t head_nbytes, const int64_t *addresses, const int64_t *lengths,
                int64_t n, int64_t nbytes);

/* Sends and receives for `budget_ns` or so. Writes up to `max` events of eight numbers each, returns how many: slot, kind, status,
   the first and last byte and the total that Content-Range tells (-1: it does not), nanoseconds until the answer began, 0.
   Kinds: 0, the answer is in its place, whole, and the socket idle. 1, the answer is an unusual one, or broken off: the caller
   goes on by itself, with nx_http_progress. 2, an idle socket has something to read, or was closed. */
int nx_http_step(nx_http *engine, int64_t budget_ns, int64_t *events, int max);

/* How far a request is: bytes sent of its head; bytes received and kept; how many of those are the answer's head with its empty
   line (0: not all of it, or an unusual one); bytes of the body in their place; nanoseconds of silence; the error
   that receiving ended with, or 0. */
void nx_http_progress(nx_http *engine, int slot, int64_t *numbers);

/* The bytes received and kept: those of nx_http_progress, or the head of the last answer. */
const char *nx_http_kept(nx_http *engine, int slot);

/* Reads memory into the caches of the processor that calls: for what goes through it in order, and waits for each byte. */
void nx_http_warm(const char *memory, int64_t nbytes);
