/* The common case of HTTP/1.1 and nothing else: a GET, answered by a 200 or 206 with the Content-Length that is wanted, on a
   connection that stays open (RFC 9112). It holds no policy: whatever else happens on a socket is left to the caller, with all
   that was received; no byte of an unusual answer's body is let into the caller's memory. One thread at a time uses an engine. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "http.h"

#define NX_HTTP_KEPT 4096
#define NX_HTTP_HEAD 2048 /* Requests with a longer head are the caller's to send. */
#define NX_HTTP_IOV 64
#define NX_HTTP_STEP (1 << 20) /* Bytes that one system call moves at most: about a tenth of a millisecond. */
#define NX_HTTP_ALIVE 4096     /* Bytes that count as a sign of life. */
#define NX_HTTP_LOW (1 << 19)  /* Of a body that is longer, so many bytes are waited for: a wake-up costs as much as 100 KiB. */
#define NX_HTTP_EVENTS 64
#define NX_HTTP_NUMBERS 8
#define NX_HTTP_DIGITS 15
#define NX_HTTP_LINE 64 /* Bytes of a processor's cache line. */

enum { NX_HTTP_DONE, NX_HTTP_STOPPED, NX_HTTP_ROUSED };
enum { NXH_IDLE, NXH_SENDING, NXH_HEAD, NXH_BODY, NXH_STOPPED };

typedef struct {
    int fd, state, status, watched, error, low, waiting;
    int64_t out_nbytes, sent, have, head_nbytes;
    int64_t wanted, got, first, last, total;
    int64_t started, active, waited, moved;
    struct iovec *iov, few[4];
    int64_t room, n_iov, at, offset; /* Of iov: allocated, used, and where the next byte goes. */
    char out[NX_HTTP_HEAD];
    char kept[NX_HTTP_KEPT];
} nxh_socket;

struct nx_http {
    int epoll_fd, n_slots;
    nxh_socket **slots;
};

static int64_t nxh_now(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

nx_http *nx_http_open(void) {
    nx_http *engine = calloc(1, sizeof *engine);
    if (engine && (engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) {
        free(engine);
        return NULL;
    }
    return engine;
}

void nx_http_close(nx_http *engine) {
    if (!engine)
        return;
    for (int slot = 0; slot < engine->n_slots; slot++)
        nx_http_release(engine, slot);
    close(engine->epoll_fd);
    free(engine->slots);
    free(engine);
}

int nx_http_fd(nx_http *engine) { return engine->epoll_fd; }

int nx_http_adopt(nx_http *engine, int fd) {
    int slot = 0;
    while (slot < engine->n_slots && engine->slots[slot])
        slot++;
    if (slot == engine->n_slots) {
        nxh_socket **more = realloc(engine->slots, (size_t)(slot + 1) * sizeof *more);
        if (!more)
            return -ENOMEM;
        more[slot] = NULL;
        engine->slots = more;
        engine->n_slots++;
    }
    nxh_socket *s = malloc(sizeof *s);
    if (!s)
        return -ENOMEM;
    memset(s, 0, offsetof(nxh_socket, out));
    s->fd = fd;
    s->low = 1;
    s->watched = EPOLLIN;
    s->iov = s->few;
    s->room = (int64_t)(sizeof s->few / sizeof *s->few);
    struct epoll_event event = {EPOLLIN, {.u32 = (uint32_t)slot}};
    if (epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        int error = -errno;
        free(s);
        return error;
    }
    engine->slots[slot] = s;
    return slot;
}

/* Lets the socket become readable at `nbytes` bytes, or when it has ended; the kernel makes room for as many. */
static void nxh_wait_for(nxh_socket *s, int nbytes) {
    if (s->low == nbytes)
        return;
    s->low = nbytes;
    setsockopt(s->fd, SOL_SOCKET, SO_RCVLOWAT, &nbytes, sizeof nbytes);
}

void nx_http_release(nx_http *engine, int slot) {
    nxh_socket *s = engine->slots[slot];
    if (!s)
        return;
    nxh_wait_for(s, 1);
    epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, s->fd, NULL);
    if (s->iov != s->few)
        free(s->iov);
    free(s);
    engine->slots[slot] = NULL;
}

static void nxh_watch(nx_http *engine, int slot, nxh_socket *s, int events) {
    if (s->watched == events)
        return;
    s->watched = events;
    struct epoll_event event = {(uint32_t)events, {.u32 = (uint32_t)slot}};
    epoll_ctl(engine->epoll_fd, EPOLL_CTL_MOD, s->fd, &event);
}

static void nxh_alive(nxh_socket *s, int64_t n) {
    s->moved += n;
    if (s->moved >= NX_HTTP_ALIVE) {
        s->moved = 0;
        s->active = nxh_now();
    }
}

/* Sends what is left of the head. Returns 0, or 1 when the caller must go on. */
static int nxh_send(nx_http *engine, int slot, nxh_socket *s) {
    while (s->sent < s->out_nbytes) {
        ssize_t n = send(s->fd, s->out + s->sent, (size_t)(s->out_nbytes - s->sent), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            nxh_watch(engine, slot, s, EPOLLIN | EPOLLOUT);
            return 0;
        }
        if (n < 0)
            return 1;
        s->sent += n;
        nxh_alive(s, n);
    }
    nxh_watch(engine, slot, s, EPOLLIN);
    s->state = NXH_HEAD;
    return 0;
}

int nx_http_get(nx_http *engine, int slot, const char *head, int64_t head_nbytes, const int64_t *addresses, const int64_t *lengths,
                int64_t n, int64_t nbytes) {
    nxh_socket *s = engine->slots[slot];
    s->sent = s->have = s->head_nbytes = s->got = s->at = s->offset = s->n_iov = s->moved = s->error = s->waiting = 0;
    s->first = s->last = s->total = -1;
    s->wanted = nbytes;
    s->started = s->active = nxh_now();
    if (head_nbytes > NX_HTTP_HEAD) {
        s->state = NXH_STOPPED;
        return 1;
    }
    if (n > s->room) {
        struct iovec *more = malloc((size_t)n * sizeof *more);
        if (!more)
            return -ENOMEM;
        if (s->iov != s->few)
            free(s->iov);
        s->iov = more;
        s->room = n;
    }
    for (int64_t i = 0; i < n; i++) {
        char *memory = (char *)(uintptr_t)addresses[i];
        struct iovec *before = s->n_iov ? &s->iov[s->n_iov - 1] : NULL;
        if (before && (char *)before->iov_base + before->iov_len == memory)
            before->iov_len += (size_t)lengths[i];
        else if (lengths[i])
            s->iov[s->n_iov++] = (struct iovec){memory, (size_t)lengths[i]};
    }
    memcpy(s->out, head, (size_t)head_nbytes);
    s->out_nbytes = head_nbytes;
    s->state = NXH_SENDING;
    if (nxh_send(engine, slot, s)) {
        s->state = NXH_STOPPED;
        return 1;
    }
    return 0;
}

/* Reads digits up to `end`, all of them; -1 if that is no number. */
static int64_t nxh_number(const char *at, const char *end) {
    int64_t value = 0;
    if (at == end || end - at > NX_HTTP_DIGITS)
        return -1;
    for (; at < end; at++) {
        if (*at < '0' || *at > '9')
            return -1;
        value = value * 10 + (*at - '0');
    }
    return value;
}

static int nxh_is(const char *at, const char *end, const char *name) {
    size_t n = strlen(name);
    return (size_t)(end - at) == n && strncasecmp(at, name, n) == 0;
}

/* Reads "bytes 0-9/10"; 0, or -1 if it is anything else. */
static int nxh_range(nxh_socket *s, const char *at, const char *end) {
    if (end - at < 6 || strncasecmp(at, "bytes ", 6))
        return -1;
    at += 6;
    const char *dash = memchr(at, '-', (size_t)(end - at));
    const char *slash = dash ? memchr(dash, '/', (size_t)(end - dash)) : NULL;
    if (!slash)
        return -1;
    s->first = nxh_number(at, dash);
    s->last = nxh_number(dash + 1, slash);
    s->total = nxh_number(slash + 1, end);
    return s->first < 0 || s->last < 0 || s->total < 0 ? -1 : 0;
}

/* Reads the head that ends at `end`, behind its empty line. Returns 0 if all is as usual, else -1. */
static int nxh_parse(nxh_socket *s, const char *end) {
    const char *at = s->kept;
    int lengths = 0, ranges = 0;
    if (end - at < 16 || memcmp(at, "HTTP/1.1 20", 11) || (at[11] != '0' && at[11] != '6') || (at[12] != ' ' && at[12] != '\r'))
        return -1;
    s->status = 200 + (at[11] - '0');
    for (int line = 0;; line++) {
        const char *stop = memchr(at, '\r', (size_t)(end - at));
        if (!stop || stop + 1 >= end || stop[1] != '\n' || memchr(at, '\n', (size_t)(stop - at)) || memchr(at, 0, (size_t)(stop - at)))
            return -1;
        if (stop == at)
            return stop + 2 == end && lengths == 1 && ranges <= 1 ? 0 : -1;
        const char *next = stop + 2;
        if (line) {
            const char *colon = memchr(at, ':', (size_t)(stop - at));
            if (!colon || colon == at)
                return -1;
            for (const char *c = at; c < colon; c++)
                if (*c <= ' ' || *c > '~')
                    return -1;
            const char *value = colon + 1;
            while (value < stop && (*value == ' ' || *value == '\t'))
                value++;
            while (stop > value && (stop[-1] == ' ' || stop[-1] == '\t'))
                stop--;
            if (nxh_is(at, colon, "content-length")) {
                lengths++;
                if (nxh_number(value, stop) != s->wanted)
                    return -1;
            } else if (nxh_is(at, colon, "content-range")) {
                ranges++;
                if (nxh_range(s, value, stop))
                    return -1;
            } else if (nxh_is(at, colon, "transfer-encoding") || (nxh_is(at, colon, "connection") && !nxh_is(value, stop, "keep-alive")))
                return -1;
        }
        at = next;
    }
}

static void nxh_copy(nxh_socket *s, const char *from, int64_t nbytes) {
    while (nbytes) {
        struct iovec *to = &s->iov[s->at];
        int64_t n = (int64_t)to->iov_len - s->offset;
        if (n > nbytes)
            n = nbytes;
        memcpy((char *)to->iov_base + s->offset, from, (size_t)n);
        from += n;
        nbytes -= n;
        s->got += n;
        s->offset += n;
        if (s->offset == (int64_t)to->iov_len) {
            s->at++;
            s->offset = 0;
        }
    }
}

/* Tells what it means that nothing was received: 0, that there is nothing yet; -1, that the connection has ended. */
static int nxh_failed(nxh_socket *s, ssize_t n) {
    if (n == 0)
        return -1;
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        return 0;
    s->error = errno;
    return -1;
}

/* Takes what the socket has of the head. Returns 1 once it is read, 0 for the next time, -1 for the caller. */
static int nxh_receive_head(nxh_socket *s) {
    ssize_t n = recv(s->fd, s->kept + s->have, (size_t)(NX_HTTP_KEPT - s->have), MSG_DONTWAIT);
    if (n <= 0)
        return nxh_failed(s, n);
    int64_t from = s->have > 3 ? s->have - 3 : 0;
    s->have += n;
    nxh_alive(s, n);
    char *empty = memmem(s->kept + from, (size_t)(s->have - from), "\r\n\r\n", 4);
    if (!empty)
        return s->have == NX_HTTP_KEPT ? -1 : 0;
    int64_t head_nbytes = empty + 4 - s->kept, body = s->have - head_nbytes;
    if (nxh_parse(s, s->kept + head_nbytes) || body > s->wanted)
        return -1;
    s->head_nbytes = head_nbytes;
    s->waited = nxh_now() - s->started;
    nxh_copy(s, s->kept + head_nbytes, body);
    s->have = head_nbytes;
    s->state = NXH_BODY;
    if (s->wanted - s->got >= NX_HTTP_LOW)
        nxh_wait_for(s, NX_HTTP_LOW);
    return 1;
}

/* Takes what the socket has of the body. Returns 1 if there may be more, 0 if not, -1 for the caller. */
static int nxh_receive_body(nxh_socket *s) {
    struct iovec some[NX_HTTP_IOV];
    int n_some = 0;
    int64_t asked = 0, offset = s->offset;
    for (int64_t i = s->at; i < s->n_iov && n_some < NX_HTTP_IOV && asked < NX_HTTP_STEP; i++, offset = 0) {
        int64_t piece = (int64_t)s->iov[i].iov_len - offset;
        if (piece > NX_HTTP_STEP - asked)
            piece = NX_HTTP_STEP - asked;
        some[n_some++] = (struct iovec){(char *)s->iov[i].iov_base + offset, (size_t)piece};
        asked += piece;
    }
    struct msghdr message = {.msg_iov = some, .msg_iovlen = (size_t)n_some};
    ssize_t n = recvmsg(s->fd, &message, MSG_DONTWAIT);
    if (n <= 0)
        return nxh_failed(s, n);
    nxh_alive(s, n);
    s->waiting = 0;
    s->got += n;
    if (s->wanted - s->got < s->low)
        nxh_wait_for(s, s->wanted > s->got ? (int)(s->wanted - s->got) : 1);
    int64_t left = n + s->offset;
    while (s->at < s->n_iov && left >= (int64_t)s->iov[s->at].iov_len)
        left -= (int64_t)s->iov[s->at++].iov_len;
    s->offset = left;
    return n == asked;
}

/* Returns the kind of event that has come about, -1 if none. */
static int nxh_work(nx_http *engine, int slot, nxh_socket *s, uint32_t ready, int64_t until) {
    if (s->state == NXH_IDLE)
        return NX_HTTP_ROUSED;
    if (s->state == NXH_STOPPED)
        return -1;
    if (s->state == NXH_SENDING) {
        /* An answer that comes while the request is not sent yet is unusual. */
        if (nxh_send(engine, slot, s) || (s->state == NXH_SENDING && (ready & ~(uint32_t)EPOLLOUT)))
            return NX_HTTP_STOPPED;
        if (s->state == NXH_SENDING || !(ready & EPOLLIN))
            return -1;
    }
    int more = 1;
    if (s->state == NXH_HEAD && (more = nxh_receive_head(s)) < 0)
        return NX_HTTP_STOPPED;
    while (more > 0 && s->got < s->wanted) {
        more = nxh_receive_body(s);
        if (more < 0)
            return NX_HTTP_STOPPED;
        if (more && s->got < s->wanted && nxh_now() > until)
            break;
    }
    if (s->state != NXH_BODY || s->got < s->wanted)
        return -1;
    s->state = NXH_IDLE;
    return NX_HTTP_DONE;
}

int nx_http_step(nx_http *engine, int64_t budget_ns, int64_t *events, int max) {
    struct epoll_event ready[NX_HTTP_EVENTS];
    int64_t until = nxh_now() + budget_ns;
    int found = 0, n = epoll_wait(engine->epoll_fd, ready, max < NX_HTTP_EVENTS ? max : NX_HTTP_EVENTS, 0);
    for (int i = 0; i < n; i++) {
        int slot = (int)ready[i].data.u32;
        nxh_socket *s = engine->slots[slot];
        int kind = nxh_work(engine, slot, s, ready[i].events, until);
        if (kind >= 0) {
            if (kind == NX_HTTP_STOPPED)
                s->state = NXH_STOPPED;
            int64_t *event = events + (int64_t)found++ * NX_HTTP_NUMBERS;
            event[0] = slot;
            event[1] = kind;
            event[2] = s->status;
            event[3] = s->first;
            event[4] = s->last;
            event[5] = s->total;
            event[6] = s->waited;
            event[7] = 0;
        }
        if (nxh_now() > until)
            break;
    }
    return found;
}

void nx_http_progress(nx_http *engine, int slot, int64_t *numbers) {
    nxh_socket *s = engine->slots[slot];
    int waiting = 0;
    /* What waits in the socket, for more to come, is a sign of life too. */
    if (s->low > 1 && ioctl(s->fd, FIONREAD, &waiting) == 0 && waiting - s->waiting >= NX_HTTP_ALIVE) {
        s->waiting = waiting;
        s->active = nxh_now();
    }
    numbers[0] = s->sent;
    numbers[1] = s->have;
    numbers[2] = s->head_nbytes;
    numbers[3] = s->got;
    numbers[4] = nxh_now() - s->active;
    numbers[5] = s->error;
}

const char *nx_http_kept(nx_http *engine, int slot) { return engine->slots[slot]->kept; }

void nx_http_warm(const char *memory, int64_t nbytes) {
    for (int64_t at = 0; at < nbytes; at += NX_HTTP_LINE)
        __builtin_prefetch(memory + at, 0, 2);
}
