/* The socket engine: serves a process's registered memory to its peers and moves bytes to and from theirs, on native threads
   that never need the GIL. Sockets are read into and written from the memory itself.

   A request names every byte range it touches; the side that serves it checks all of them against what is registered before
   the first byte moves. `tcp_state.c` has the types, regions and completions, `tcp_stream.c` what one connection does. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "tcp.h"
#include "past_cache.c"
#include "regions.c"
#include "tcp_state.c"
#include "tcp_stream.c"

#define TCP_EVENTS 64
/* How long a connection may take to introduce itself, and how often those that have not are looked at. */
#define TCP_STRANGER_NS 2000000000ll
#define TCP_SWEEP_MS 500
#define TCP_SPIN_NS 100000ll
#define TCP_BRISK_NS 200000ll /* what comes before this has waited for little more than to be woken */
#define TCP_SPIN_MISSED 8

/* Streams. */

static nx_tcp_stream *tcp_new_stream(nx_tcp *engine, int fd, int64_t id, int ours) {
    nx_tcp_stream *stream = calloc(1, sizeof *stream);
    char *stage = malloc(TCP_STAGE);
    if (!stream || !stage) {
        free(stream);
        free(stage);
        return NULL;
    }
    unsigned which = __atomic_fetch_add(&engine->next_loop, 1, __ATOMIC_RELAXED);
    stream->loop = &engine->loops[which % (unsigned)engine->n_loops];
    stream->refs = ours ? 2 : 1;
    pthread_mutex_init(&stream->lock, NULL);
    stream->fd = fd;
    stream->ours = ours;
    stream->id = id;
    stream->writable = 1;
    stream->express = -1;
    stream->phase = ours ? RX_HEAD : RX_HELLO;
    stream->queue.end = &stream->queue.first;
    stream->waiting.end = &stream->waiting.first;
    stream->last_rx_ns = stream->since_ns = tcp_clock();
    stream->stage = stage;
    return stream;
}

/* Express streams have a list of their own: their owner's thread may end them while the loop's walks through the other. */
static nx_tcp_stream **tcp_list(nx_tcp_stream *stream) {
    return stream->express >= 0 ? &stream->loop->express : &stream->loop->streams;
}

static int tcp_add(nx_tcp_stream *stream) {
    tcp_loop *loop = stream->loop;
    nx_tcp_stream **list = tcp_list(stream);
    pthread_mutex_lock(&loop->lock);
    stream->next = *list;
    if (stream->next)
        stream->next->previous = stream;
    *list = stream;
    pthread_mutex_unlock(&loop->lock);
    if (stream->express >= 0)
        return 0;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = stream};
    return epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, stream->fd, &event) ? -errno : 0;
}

static void tcp_fail(nx_tcp_stream *stream, tcp_frame *frame, int64_t status) {
    nx_tcp *engine = stream->loop->engine;
    if (stream->ours)
        tcp_ended_request(stream, (int64_t)frame->header.id, status);
    tcp_free(engine, frame);
}

/* Closes a stream and fails what it carries; runs on its loop's thread, an express one's owner's too; the stream's lock is held. */
static void tcp_end(nx_tcp_stream *stream, int status) {
    tcp_loop *loop = stream->loop;
    nx_tcp *engine = loop->engine;
    if (stream->fd < 0)
        return;
    if (stream->express < 0)
        epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, stream->fd, NULL);
    if (stream->queue.first || stream->waiting.first || stream->rx_frame) {
        /* A reset overtakes what is queued: the other side must not go on writing what was given up. */
        struct linger reset = {.l_onoff = 1};
        setsockopt(stream->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    }
    if (stream->express < 0) {
        close(stream->fd);
    } else {
        /* Its number is still in the owner's event loop: disconnected at once, closed when that has let go of it. */
        struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
        if (connect(stream->fd, &nowhere, sizeof nowhere))
            shutdown(stream->fd, SHUT_RDWR);
    }
    stream->fd = -1;
    tcp_stranger_went(engine, stream);
    int64_t failed = status ? status : -ENOTCONN;
    if (stream->rx_frame)
        tcp_fail(stream, stream->rx_frame, failed);
    stream->rx_frame = NULL;
    while (stream->waiting.first)
        tcp_fail(stream, tcp_pop(&stream->waiting), failed);
    while (stream->queue.first)
        tcp_fail(stream, tcp_pop(&stream->queue), failed);
    pthread_mutex_lock(&loop->lock);
    if (stream->next)
        stream->next->previous = stream->previous;
    if (stream->previous)
        stream->previous->next = stream->next;
    else
        *tcp_list(stream) = stream->next;
    /* Freed after the round: the ready list may still hold it. */
    stream->next = loop->ended;
    loop->ended = stream;
    pthread_mutex_unlock(&loop->lock);
    if (stream->ours)
        tcp_complete(engine, stream->id, status);
}

static void tcp_make_ready(tcp_loop *loop, nx_tcp_stream *stream) {
    if (stream->in_ready)
        return;
    stream->in_ready = 1;
    stream->next_ready = loop->ready;
    loop->ready = stream;
}

/* Gives a stream its turn; returns whether it wants another without waiting for events. */
static int tcp_turn(nx_tcp_stream *stream) {
    pthread_mutex_lock(&stream->lock);
    int more = 0;
    if (stream->fd >= 0) {
        int sending = tcp_send(stream, TCP_QUANTUM);
        int receiving = sending < 0 ? 0 : tcp_receive(stream, TCP_QUANTUM);
        /* What was received may have an answer, or have freed a credit. */
        if (sending >= 0 && receiving >= 0)
            sending = tcp_send(stream, TCP_QUANTUM);
        if (sending < 0 || receiving < 0)
            tcp_end(stream, sending < 0 ? sending : receiving);
        else
            more = sending || receiving;
    }
    pthread_mutex_unlock(&stream->lock);
    return more;
}

/* Commands. */

static void tcp_post(tcp_loop *loop, tcp_command *command) {
    uint64_t one = 1;
    command->next = NULL;
    if (command->stream)
        __atomic_add_fetch(&command->stream->refs, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&loop->lock);
    *loop->end = command;
    loop->end = &command->next;
    int wake = loop->sleeping;
    loop->sleeping = 0;
    pthread_mutex_unlock(&loop->lock);
    if (wake)
        while (write(loop->wake_fd, &one, 8) < 0 && errno == EINTR) {}
}

static tcp_command *tcp_new_command(int kind, nx_tcp_stream *stream, int64_t id, size_t extra) {
    tcp_command *command = calloc(1, sizeof *command + extra);
    if (command) {
        command->kind = kind;
        command->stream = stream;
        command->id = id;
    }
    return command;
}

static void tcp_cancel(nx_tcp_stream *stream, uint64_t id) {
    nx_tcp *engine = stream->loop->engine;
    for (tcp_frame **place = &stream->queue.first; *place; place = &(*place)->next) {
        tcp_frame *frame = *place;
        if (frame->header.id != id)
            continue;
        /* One that has begun is waited for: it is short, and the bytes under way cannot be called back. */
        if (frame->head_done)
            return;
        *place = frame->next;
        if (stream->queue.end == &frame->next)
            stream->queue.end = place;
        tcp_complete(engine, (int64_t)id, -ECANCELED);
        tcp_free(engine, frame);
        return;
    }
}

static int tcp_holds(const tcp_frame *frame, uint64_t key) {
    for (uint32_t i = 0; frame && i < frame->n_held; i++)
        if (frame->held[i]->key == key)
            return 1;
    return 0;
}

/* Ends the streams of this loop that `command` means: a peer's, or those whose requests still touch a region. */
static void tcp_end_some(tcp_loop *loop, const tcp_command *command) {
    nx_tcp_stream *next;
    for (nx_tcp_stream *stream = loop->streams; stream; stream = next) {
        next = stream->next;
        if (stream->ours || stream->phase == RX_HELLO)
            continue;
        pthread_mutex_lock(&stream->lock);
        int wanted = 0;
        if (command->kind == DO_DROP_ACCEPTED) {
            wanted = stream->n_identity >= command->n_identity &&
                     memcmp(stream->identity, command->identity, command->n_identity) == 0;
        } else {
            wanted = tcp_holds(stream->rx_frame, command->key);
            for (tcp_frame *frame = stream->queue.first; frame && !wanted; frame = frame->next)
                wanted = tcp_holds(frame, command->key);
        }
        if (wanted)
            tcp_end(stream, -ECONNRESET);
        pthread_mutex_unlock(&stream->lock);
    }
}

static void tcp_obey(tcp_loop *loop, tcp_command *command) {
    nx_tcp *engine = loop->engine;
    nx_tcp_stream *stream = command->stream;
    if (stream) {
        pthread_mutex_lock(&stream->lock);
        if (command->kind == DO_CANCEL) {
            tcp_cancel(stream, (uint64_t)command->id);
        } else if (command->kind == DO_DROP) {
            tcp_end(stream, 0);
        } else if (stream->fd < 0) {
            if (command->frame)
                tcp_fail(stream, command->frame, -ENOTCONN);
        } else {
            if (command->frame)
                tcp_push(&stream->queue, command->frame);
            tcp_make_ready(loop, stream);
        }
        pthread_mutex_unlock(&stream->lock);
        tcp_unref(stream);
    } else {
        tcp_end_some(loop, command);
        if (__atomic_sub_fetch(command->countdown, 1, __ATOMIC_ACQ_REL) == 0) {
            free(command->countdown);
            if (command->kind == DO_DROP_ACCEPTED)
                tcp_complete(engine, command->id, 0);
        }
    }
    free(command);
}

/* Posts one command to every loop; the last to obey frees the countdown. */
static int tcp_post_all(nx_tcp *engine, int kind, uint64_t key, const uint8_t *identity, size_t n_identity, int64_t id) {
    int *countdown = malloc(sizeof *countdown);
    tcp_command **commands = calloc((size_t)engine->n_loops, sizeof *commands);
    int ready = countdown && commands;
    for (int i = 0; ready && i < engine->n_loops; i++)
        ready = (commands[i] = tcp_new_command(kind, NULL, id, n_identity)) != NULL;
    if (ready)
        *countdown = engine->n_loops;
    else
        free(countdown);
    for (int i = 0; commands && i < engine->n_loops; i++) {
        tcp_command *command = commands[i];
        if (!ready) {
            free(command);
            continue;
        }
        command->key = key;
        command->countdown = countdown;
        command->n_identity = (uint32_t)n_identity;
        if (n_identity)
            memcpy(command->identity, identity, n_identity);
        tcp_post(&engine->loops[i], command);
    }
    free(commands);
    return ready ? 0 : -ENOMEM;
}

/* The loop. */

/* No TCP_USER_TIMEOUT: a peer that is merely stopped would be cut off. A dead network shows on the control connection: what is idle
   must outlast a gap that this one outlasts, and is given up here only where there is none. */
static void tcp_tune(int fd) {
    int on = 1, idle = 1, count = 14;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

/* Returns what a connection counts for: its IPv4 address, or the /64 that its IPv6 address is in. */
static unsigned tcp_source(const struct sockaddr_storage *address) {
    uint64_t source = 0;
    if (address->ss_family == AF_INET)
        source = ((const struct sockaddr_in *)address)->sin_addr.s_addr;
    else if (address->ss_family == AF_INET6)
        memcpy(&source, &((const struct sockaddr_in6 *)address)->sin6_addr, sizeof source);
    return (unsigned)((source * 0x9e3779b97f4a7c15ull) >> 32) % TCP_SOURCES;
}

static void tcp_accept(nx_tcp *engine, int listener) {
    for (;;) {
        struct sockaddr_storage address;
        socklen_t n_address = sizeof address;
        int fd = accept4(listener, (struct sockaddr *)&address, &n_address, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
                /* The connection stays in the backlog and the socket readable: without a pause this would spin. */
                struct timespec pause = {.tv_nsec = 10000000};
                nanosleep(&pause, NULL);
            }
            return;
        }
        tcp_make_room(engine);
        nx_tcp_stream *stream = tcp_new_stream(engine, fd, 0, 0);
        if (!stream) {
            close(fd);
            continue;
        }
        stream->source = tcp_source(&address);
        tcp_stranger_came(engine, stream);
        tcp_tune(fd);
        /* It cannot end before its loop has heard of it, and that it does through epoll. */
        tcp_add(stream);
    }
}

static void tcp_free_ended(tcp_loop *loop) {
    pthread_mutex_lock(&loop->lock);
    nx_tcp_stream *stream = loop->ended;
    loop->ended = NULL;
    pthread_mutex_unlock(&loop->lock);
    while (stream) {
        nx_tcp_stream *next = stream->next;
        tcp_unref(stream);
        stream = next;
    }
}

static void tcp_sweep(tcp_loop *loop) {
    int64_t now = tcp_clock();
    if (now - loop->swept_ns < TCP_SWEEP_MS * 1000000ll)
        return;
    loop->swept_ns = now;
    nx_tcp_stream *next;
    for (nx_tcp_stream *stream = loop->streams; stream; stream = next) {
        next = stream->next;
        pthread_mutex_lock(&stream->lock);
        if (stream->phase == RX_HELLO && now - stream->since_ns > TCP_STRANGER_NS)
            tcp_end(stream, -ETIMEDOUT);
        pthread_mutex_unlock(&stream->lock);
    }
}

static void tcp_take_event(tcp_loop *loop, const struct epoll_event *event) {
    nx_tcp *engine = loop->engine;
    uint64_t drained;
    if (event->data.ptr == loop) {
        while (read(loop->wake_fd, &drained, 8) < 0 && errno == EINTR) {}
    } else if ((int *)event->data.ptr >= engine->listeners && (int *)event->data.ptr < engine->listeners + TCP_MAX_LISTENERS) {
        tcp_accept(engine, *(int *)event->data.ptr);
    } else {
        nx_tcp_stream *stream = event->data.ptr;
        pthread_mutex_lock(&stream->lock);
        stream->readable |= (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        stream->writable |= (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0;
        stream->ended |= (event->events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        pthread_mutex_unlock(&stream->lock);
        tcp_make_ready(loop, stream);
    }
}

static int64_t tcp_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Waits for events. Where the last ones came soon, those that follow are looked for without sleeping first: where small requests
   follow each other, being woken takes longer than all the rest of them. After a miss several have to come soon before the next try. */
static int tcp_wait(tcp_loop *loop, struct epoll_event *events, int timeout_ms) {
    int n = 0, spins = loop->brisk > 0;
    int64_t began = tcp_now();
    while (spins && n == 0 && tcp_now() - began < TCP_SPIN_NS) {
        n = epoll_wait(loop->epoll_fd, events, TCP_EVENTS, 0);
        if (n == 0)
            sched_yield();
    }
    if (n != 0)
        return n;
    n = epoll_wait(loop->epoll_fd, events, TCP_EVENTS, timeout_ms);
    if (spins)
        loop->brisk = -TCP_SPIN_MISSED;
    else if (tcp_now() - began < TCP_BRISK_NS)
        loop->brisk++;
    else
        loop->brisk = loop->brisk < 0 ? loop->brisk : 0;
    return n;
}

static void *tcp_run(void *argument) {
    tcp_loop *loop = argument;
    struct epoll_event events[TCP_EVENTS];
    for (;;) {
        pthread_mutex_lock(&loop->lock);
        tcp_command *command = loop->first;
        loop->first = NULL;
        loop->end = &loop->first;
        int stop = loop->stop;
        loop->sleeping = !command && !loop->ready && !stop;
        int sleeping = loop->sleeping;
        pthread_mutex_unlock(&loop->lock);
        while (command) {
            tcp_command *next = command->next;
            tcp_obey(loop, command);
            command = next;
        }
        if (stop)
            return NULL;
        int strangers = __atomic_load_n(&loop->engine->strangers, __ATOMIC_RELAXED);
        int n = sleeping ? tcp_wait(loop, events, strangers ? TCP_SWEEP_MS : -1) : epoll_wait(loop->epoll_fd, events, TCP_EVENTS, 0);
        if (sleeping) {
            pthread_mutex_lock(&loop->lock);
            loop->sleeping = 0;
            pthread_mutex_unlock(&loop->lock);
        }
        for (int i = 0; i < n; i++)
            tcp_take_event(loop, &events[i]);
        nx_tcp_stream *ready = loop->ready;
        loop->ready = NULL;
        while (ready) {
            nx_tcp_stream *stream = ready;
            ready = stream->next_ready;
            stream->in_ready = 0;
            if (tcp_turn(stream))
                tcp_make_ready(loop, stream);
        }
        if (strangers)
            tcp_sweep(loop);
        if (!loop->ready)
            tcp_free_ended(loop);
    }
}

/* What Python calls. */

/* Stops the threads and frees everything. No op may be in flight. Completions are not reported any more. */
void nx_tcp_close(nx_tcp *engine) {
    uint64_t one = 1;
    for (int i = 0; i < engine->n_loops; i++) {
        tcp_loop *loop = &engine->loops[i];
        pthread_mutex_lock(&loop->lock);
        loop->stop = 1;
        pthread_mutex_unlock(&loop->lock);
        if (loop->started) {
            while (write(loop->wake_fd, &one, 8) < 0 && errno == EINTR) {}
            pthread_join(loop->thread, NULL);
        }
    }
    for (int i = 0; i < engine->n_loops; i++) {
        tcp_loop *loop = &engine->loops[i];
        while (loop->streams || loop->express) {
            nx_tcp_stream *stream = loop->streams ? loop->streams : loop->express;
            pthread_mutex_lock(&stream->lock);
            tcp_end(stream, 0);
            pthread_mutex_unlock(&stream->lock);
        }
        while (loop->first) {
            tcp_command *command = loop->first;
            loop->first = command->next;
            tcp_obey(loop, command);
        }
        tcp_free_ended(loop);
        if (loop->epoll_fd >= 0)
            close(loop->epoll_fd);
        if (loop->wake_fd >= 0)
            close(loop->wake_fd);
        pthread_mutex_destroy(&loop->lock);
    }
    for (int i = 0; i < engine->n_listeners; i++)
        close(engine->listeners[i]);
    regions_clear(&engine->regions);
    while (engine->guests) {
        tcp_guest *guest = engine->guests;
        engine->guests = guest->next;
        free(guest);
    }
    pthread_mutex_destroy(&engine->regions.lock);
    pthread_mutex_destroy(&engine->guests_lock);
    pthread_mutex_destroy(&engine->done_lock);
    pthread_mutex_destroy(&engine->strangers_lock);
    free(engine->done);
    free(engine);
}

/* Starts `threads` loops. `event_fd` (the caller's) is written to when there are completions. Returns NULL when the system has no
   thread or descriptor left. */
nx_tcp *nx_tcp_open(int threads, int event_fd) {
    nx_tcp *engine = calloc(1, sizeof *engine + (size_t)threads * sizeof(tcp_loop));
    if (!engine)
        return NULL;
    engine->event_fd = event_fd;
    engine->n_loops = threads;
    pthread_mutex_init(&engine->regions.lock, NULL);
    pthread_mutex_init(&engine->guests_lock, NULL);
    pthread_mutex_init(&engine->done_lock, NULL);
    pthread_mutex_init(&engine->strangers_lock, NULL);
    int failed = 0;
    sigset_t all, before;
    sigfillset(&all);
    /* Signals are for Python's main thread. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < threads; i++) {
        tcp_loop *loop = &engine->loops[i];
        loop->engine = engine;
        loop->end = &loop->first;
        pthread_mutex_init(&loop->lock, NULL);
        loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
        loop->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = loop};
        failed |= loop->epoll_fd < 0 || loop->wake_fd < 0 || epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, loop->wake_fd, &event);
        if (!failed) {
            failed = pthread_create(&loop->thread, NULL, tcp_run, loop);
            loop->started = !failed;
            if (!failed)
                pthread_setname_np(loop->thread, "nixl-tcp");
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        nx_tcp_close(engine);
        return NULL;
    }
    return engine;
}

/* Accepts connections on the listening, non-blocking socket `fd`, which belongs to the engine from here on. Returns 0, or -errno
   and leaves `fd` to the caller. Not to be called by two threads at once. */
int nx_tcp_listen(nx_tcp *engine, int fd) {
    if (engine->n_listeners == TCP_MAX_LISTENERS)
        return -ENOSPC;
    int *listener = &engine->listeners[engine->n_listeners];
    *listener = fd;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = listener};
    if (epoll_ctl(engine->loops[0].epoll_fd, EPOLL_CTL_ADD, fd, &event))
        return -errno;
    engine->n_listeners++;
    return 0;
}

/* Cuts off the peers whose requests still touch a region that is being unregistered. */
int nx_tcp_cut_region(nx_tcp *engine, uint64_t key) { return tcp_post_all(engine, DO_CUT_REGION, key, NULL, 0, 0); }

/* Cuts off the streams whose other side introduced itself with what begins with `identity`; `id` completes when no request of
   theirs is served any more. With `dismiss` the token of that identity lets nobody in from here on. */
int nx_tcp_drop_accepted(nx_tcp *engine, const uint8_t *identity, int64_t n_identity, int64_t id, int dismiss) {
    /* Whoever was recognised before is known by its identity to the loop that is about to be told. */
    if (dismiss)
        tcp_dismiss(engine, identity, (size_t)n_identity);
    return tcp_post_all(engine, DO_DROP_ACCEPTED, 0, identity, (size_t)n_identity, id);
}

/* Takes over a connected, greeted, non-blocking socket. `id` completes when the connection ends: 0 after nx_tcp_drop, else
   -errno. An `express` one is driven by nx_tcp_now and nx_tcp_pump alone; the caller watches its socket until it forgets it.
   Returns NULL, and leaves `fd` to the caller, when there is no memory left. */
nx_tcp_stream *nx_tcp_adopt(nx_tcp *engine, int fd, int64_t id, int express) {
    nx_tcp_stream *stream = tcp_new_stream(engine, fd, id, 1);
    if (!stream)
        return NULL;
    if (express)
        stream->express = fd;
    tcp_tune(fd);
    tcp_add(stream);
    return stream;
}

/* Gives up the pointer that nx_tcp_adopt returned; call it after the stream's id completed, before nx_tcp_close. */
void nx_tcp_forget(nx_tcp_stream *stream) { tcp_unref(stream); }

static tcp_frame *tcp_new_request(int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                                  const int64_t *lengths, const int64_t *index, int64_t n_keys, const uint8_t *keys,
                                  int64_t nbytes) {
    size_t n_head = sizeof(tcp_header) + 8ul * (size_t)n_keys + sizeof(tcp_entry) * (size_t)n;
    tcp_frame *frame = calloc(1, sizeof *frame);
    char *memory = malloc(n_head + sizeof(tcp_entry) * (size_t)n);
    if (!frame || !memory) {
        free(frame);
        free(memory);
        return NULL;
    }
    frame->header = (tcp_header){.magic = TCP_MAGIC, .kind = put ? TCP_PUT : TCP_GET, .n_segments = (uint32_t)n,
                                 .n_keys = (uint32_t)n_keys, .id = (uint64_t)id, .nbytes = (uint64_t)nbytes};
    memcpy(memory, &frame->header, sizeof frame->header);
    memcpy(memory + sizeof(tcp_header), keys, 8ul * (size_t)n_keys);
    tcp_entry *segments = (tcp_entry *)(void *)(memory + sizeof(tcp_header) + 8 * n_keys);
    frame->iov = segments + n;
    for (int64_t i = 0; i < n; i++) {
        segments[i].segment.address = (uint64_t)remote[i];
        segments[i].segment.nbytes = (uint32_t)lengths[i];
        segments[i].segment.key = index ? (uint32_t)index[i] : 0;
        frame->iov[i].iov = (struct iovec){(void *)(uintptr_t)local[i], (size_t)lengths[i]};
    }
    frame->memory = memory;
    frame->head = memory;
    frame->n_head = n_head;
    frame->n_iov = n;
    frame->left = (uint64_t)nbytes;
    return frame;
}

/* Queues a request: `n` segments, segment i between local[i] and remote[i], which lies in the peer's region of key
   index[i] of `keys` (index NULL: all in the first). `id` completes with 0, a refusal (> 0) or -errno. Returns 0 or -ENOMEM. */
int nx_tcp_submit(nx_tcp_stream *stream, int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                  const int64_t *lengths, const int64_t *index, int64_t n_keys, const uint8_t *keys, int64_t nbytes) {
    tcp_frame *frame = tcp_new_request(id, put, n, local, remote, lengths, index, n_keys, keys, nbytes);
    tcp_command *command = frame ? tcp_new_command(DO_SUBMIT, stream, id, 0) : NULL;
    if (!command) {
        if (frame)
            tcp_free(stream->loop->engine, frame);
        return -ENOMEM;
    }
    command->frame = frame;
    tcp_post(stream->loop, command);
    return 0;
}

/* Drives an express stream as far as its socket allows; returns 1 when bytes wait for room in it, 0 when none do, and -ENOTCONN
   when the stream has ended. */
int nx_tcp_pump(nx_tcp_stream *stream) {
    pthread_mutex_lock(&stream->lock);
    int result = stream->fd < 0 ? -ENOTCONN : 0;
    if (!result) {
        stream->readable = stream->writable = 1;
        result = tcp_receive(stream, TCP_QUANTUM);
        if (result >= 0)
            result = tcp_send(stream, TCP_QUANTUM);
        if (result < 0)
            tcp_end(stream, result);
        result = result < 0 ? -ENOTCONN : stream->queue.first != NULL;
    }
    pthread_mutex_unlock(&stream->lock);
    return result;
}

/* Sends a request over an idle express stream and looks for its answer for up to `spin_ns` nanoseconds. Returns how it ended, as
   `id` would complete; -EINPROGRESS when it is under way and `id` will complete; -EBUSY when it was not sent. */
int64_t nx_tcp_now(nx_tcp_stream *stream, int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                   const int64_t *lengths, const int64_t *index, int64_t n_keys, const uint8_t *keys, int64_t nbytes,
                   int64_t spin_ns) {
    if (pthread_mutex_trylock(&stream->lock))
        return -EBUSY;
    tcp_frame *frame = NULL;
    if (stream->fd >= 0 && stream->requests == 0 && !stream->queue.first)
        frame = tcp_new_request(id, put, n, local, remote, lengths, index, n_keys, keys, nbytes);
    if (!frame) {
        pthread_mutex_unlock(&stream->lock);
        return -EBUSY;
    }
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    int64_t end = time.tv_sec * 1000000000ll + time.tv_nsec + spin_ns;
    tcp_push(&stream->queue, frame);
    stream->now = id;
    int result = 0;
    while (result >= 0 && stream->now) {
        if (stream->queue.first) {
            stream->writable = 1;
            result = tcp_send(stream, TCP_QUANTUM);
            if (result < 0)
                break;
        }
        stream->readable = 1;
        result = tcp_receive(stream, TCP_QUANTUM);
        clock_gettime(CLOCK_MONOTONIC, &time);
        if (time.tv_sec * 1000000000ll + time.tv_nsec >= end)
            break;
    }
    if (result < 0)
        tcp_end(stream, result);
    int64_t status = stream->now ? -EINPROGRESS : stream->now_status;
    stream->now = 0;
    pthread_mutex_unlock(&stream->lock);
    return status;
}

/* Takes back a request of which nothing was sent (its id completes with -ECANCELED); one under way goes on to its end. */
int nx_tcp_cancel(nx_tcp_stream *stream, int64_t id) {
    tcp_command *command = tcp_new_command(DO_CANCEL, stream, id, 0);
    if (!command)
        return -ENOMEM;
    tcp_post(stream->loop, command);
    return 0;
}

/* Closes the connection; what it carries fails. */
int nx_tcp_drop(nx_tcp_stream *stream) {
    tcp_command *command = tcp_new_command(DO_DROP, stream, 0, 0);
    if (!command)
        return -ENOMEM;
    tcp_post(stream->loop, command);
    return 0;
}

/* How many bytes peers have read from our memory and written to it by requests of theirs. */
void nx_tcp_served(nx_tcp *engine, int64_t *nbytes) {
    nbytes[0] = __atomic_load_n(&engine->read_nbytes, __ATOMIC_RELAXED);
    nbytes[1] = __atomic_load_n(&engine->written_nbytes, __ATOMIC_RELAXED);
}
