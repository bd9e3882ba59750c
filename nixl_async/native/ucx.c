/* The UCX engine: one-sided copies and active messages over the context and worker that UCXX made, progressed by one native
   thread that never needs the GIL and sleeps on the worker's armed event descriptor.

   Nothing is linked: the functions are looked up in the libucp that the process has loaded already, whichever wheel or system
   it came from. Only the engine's thread posts on endpoints, so that no operation meets an endpoint that has just failed. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include "ucx.h"

#define UCX_AM_ID 0
#define UCX_WINDOW 256
#define UCX_POST_SEGMENTS 64
#define UCX_POST_BYTES (1 << 20)
#define UCX_POST_VRAM_BYTES (16 << 20)
#define UCX_WATCHDOG_MS 500
#define UCX_GRACE_NS 1000000000ll
#define UCX_DRAIN_NS 100000000ll
#define UCX_MAX_MESSAGES_NBYTES (256ll << 20)
#define UCX_MAX_LANES 32
#define UCX_LANES_ROOM 1024
#define UCX_LANES_NS 1000000000ll

#define UCX_FUNCTIONS(X)                                                                                                      \
    X(ucp_worker_progress)                                                                                                     \
    X(ucp_worker_arm)                                                                                                          \
    X(ucp_worker_get_efd)                                                                                                      \
    X(ucp_worker_get_address)                                                                                                  \
    X(ucp_worker_release_address)                                                                                              \
    X(ucp_worker_set_am_recv_handler)                                                                                          \
    X(ucp_context_query)                                                                                                       \
    X(ucp_mem_map)                                                                                                             \
    X(ucp_mem_unmap)                                                                                                           \
    X(ucp_rkey_pack)                                                                                                           \
    X(ucp_rkey_buffer_release)                                                                                                 \
    X(ucp_ep_rkey_unpack)                                                                                                      \
    X(ucp_rkey_destroy)                                                                                                        \
    X(ucp_ep_create)                                                                                                           \
    X(ucp_ep_query)                                                                                                            \
    X(ucp_ep_close_nbx)                                                                                                        \
    X(ucp_ep_flush_nbx)                                                                                                        \
    X(ucp_put_nbx)                                                                                                             \
    X(ucp_get_nbx)                                                                                                             \
    X(ucp_am_send_nbx)                                                                                                         \
    X(ucp_request_check_status)                                                                                                \
    X(ucp_request_free)                                                                                                        \
    X(ucp_get_version_string)

#define UCX_POINTER(name) __typeof__(&name) name;
static struct {
    UCX_FUNCTIONS(UCX_POINTER)
    const char *(*ucs_status_string)(ucs_status_t);
} ucx;

/* CUDA Driver API, "Context Management": what UCX's CUDA transports need around their own calls. */
static struct {
    int (*cuCtxSetCurrent)(void *);
    int (*cuCtxPushCurrent)(void *);
    int (*cuCtxPopCurrent)(void **);
} cuda;

typedef struct ucx_chunk ucx_chunk;
typedef struct ucx_region ucx_region;

typedef struct ucx_op {
    struct ucx_op *next;
    struct nx_ucx_ep *ep;
    int64_t id, n, at, in_flight;
    int put, flushing, cancelled;
    int vram;       /* whether the local side is a device's memory */
    ucp_mem_h memh; /* of the local side, if it is one region of VRAM */
    ucs_status_t status;
    int64_t *local, *remote, *lengths, *index; /* `index` may be NULL: every segment lies in the first region */
    void **rkeys;
    uint64_t *tokens; /* of the regions, NULL where nothing may be packed */
    int64_t n_keys;
    int n_chunks;
    ucx_chunk *chunks; /* the packed messages under way */
    char *message; /* an active message instead of a copy */
    int64_t n_message;
} ucx_op;

struct nx_ucx_ep {
    nx_ucx_ep *next;
    nx_ucx *engine;
    ucp_ep_h ep;
    int64_t id;
    uint64_t identity; /* of the peer, 0 for one that is no agent of ours */
    int refs, wants_close, flushed, closed, reported, hears, gone, broken; /* `broken`: UCX says that it failed */
    int64_t drain_ns; /* until when what it has taken may be sent before it is closed by force */
    int64_t stop_ns; /* when its closing, or the end of one of its ops, was asked for */
    int64_t lanes_ns; /* when UCX was last asked for its lanes */
    char lanes[UCX_LANES_ROOM]; /* "transport device" a line; the engine's lock guards it */
    ucs_status_t failed;
    ucs_status_ptr_t flush, closing; /* the flush before it closes; that it closes */
    ucx_op *ops;
};

enum { UCX_DO_ADD, UCX_DO_SUBMIT, UCX_DO_CANCEL, UCX_DO_CLOSE, UCX_DO_FAIL, UCX_DO_SETTLE, UCX_DO_CUDA };

typedef struct ucx_command {
    struct ucx_command *next;
    int kind;
    nx_ucx_ep *ep;
    ucx_op *op;
    int64_t id;
} ucx_command;

typedef struct ucx_message {
    struct ucx_message *next;
    int64_t nbytes;
    char data[];
} ucx_message;

typedef struct {
    int64_t id, status;
} ucx_completion;

struct nx_ucx {
    ucp_context_h context;
    ucp_worker_h worker;
    int event_fd, wake_fd, worker_fd, stop, sleeping;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows */
    ucx_command *first, **end;
    ucx_completion *done;
    int64_t n_done, at_done, room_done;
    ucx_message *messages, **messages_end;
    int64_t messages_nbytes;
    uintptr_t cuda_context; /* that the thread has made current, 0 before */
    pthread_cond_t cuda_ready;
    pthread_mutex_t close_lock; /* guards every endpoint's `gone` */
    pthread_mutex_t regions_lock;
    ucx_region *regions;
    uint64_t identity;
    nx_ucx_ep *eps; /* the thread's own, as is the rest */
    uint64_t last_chunk;
    int64_t replies_nbytes;
};

static int ucx_load(char *why, int64_t n_why) {
    void *ucp = dlopen("libucp.so.0", RTLD_NOLOAD | RTLD_LAZY), *ucs = dlopen("libucs.so.0", RTLD_NOLOAD | RTLD_LAZY);
    if (!ucp || !ucs) {
        snprintf(why, (size_t)n_why, "libucp is not loaded in this process");
        return -1;
    }
#define UCX_FIND(name)                                                                                                         \
    ucx.name = (__typeof__(ucx.name))dlsym(ucp, #name);                                                                        \
    if (!ucx.name) {                                                                                                           \
        snprintf(why, (size_t)n_why, "the loaded libucp has no " #name);                                                       \
        return -1;                                                                                                             \
    }
    UCX_FUNCTIONS(UCX_FIND)
    ucx.ucs_status_string = (__typeof__(ucx.ucs_status_string))dlsym(ucs, "ucs_status_string");
    return ucx.ucs_status_string ? 0 : -1;
}

static int cuda_load(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
    if (!driver)
        return -1;
    cuda.cuCtxSetCurrent = (int (*)(void *))dlsym(driver, "cuCtxSetCurrent");
    cuda.cuCtxPushCurrent = (int (*)(void *))dlsym(driver, "cuCtxPushCurrent_v2");
    cuda.cuCtxPopCurrent = (int (*)(void **))dlsym(driver, "cuCtxPopCurrent_v2");
    return cuda.cuCtxSetCurrent && cuda.cuCtxPushCurrent && cuda.cuCtxPopCurrent ? 0 : -1;
}

/* Makes a context current on the calling thread for a few calls into UCX; returns whether `cuda_leave` has to undo it. */
static int cuda_enter(uintptr_t context) { return context && !cuda.cuCtxPushCurrent((void *)context); }

static void cuda_leave(int entered) {
    void *context;
    if (entered)
        cuda.cuCtxPopCurrent(&context);
}

const char *nx_ucx_text(int status) {
    return status == -1000 ? "cancelled" : ucx.ucs_status_string ? ucx.ucs_status_string((ucs_status_t)status) : "unknown";
}

/* Towards Python's loop. */

static void ucx_ring(nx_ucx *engine) {
    uint64_t one = 1;
    while (write(engine->event_fd, &one, 8) < 0 && errno == EINTR) {}
}

static void ucx_complete(nx_ucx *engine, int64_t id, int64_t status) {
    pthread_mutex_lock(&engine->lock);
    if (engine->n_done == engine->room_done) {
        int64_t room = engine->room_done ? 2 * engine->room_done : 256;
        ucx_completion *grown = realloc(engine->done, (size_t)room * sizeof *grown);
        if (!grown)
            abort(); /* Losing a completion would leave a caller waiting for ever. */
        engine->done = grown;
        engine->room_done = room;
    }
    engine->done[engine->n_done++] = (ucx_completion){id, status};
    pthread_mutex_unlock(&engine->lock);
    ucx_ring(engine);
}

/* Returns up to `max` completions: 0, a UCX error (< 0), or -1000 for a copy that was stopped. */
int nx_ucx_completions(nx_ucx *engine, int64_t *ids, int64_t *statuses, int max) {
    uint64_t drained;
    while (read(engine->event_fd, &drained, 8) < 0 && errno == EINTR) {}
    pthread_mutex_lock(&engine->lock);
    int n = 0;
    while (n < max && engine->at_done < engine->n_done) {
        ucx_completion *one = &engine->done[engine->at_done++];
        ids[n] = one->id;
        statuses[n++] = one->status;
    }
    int more = engine->at_done < engine->n_done || engine->messages;
    if (engine->at_done == engine->n_done)
        engine->at_done = engine->n_done = 0;
    pthread_mutex_unlock(&engine->lock);
    if (more)
        ucx_ring(engine);
    return n;
}

/* Takes the oldest message that has arrived. Returns its bytes, -1 when there is none, or the room it needs as -2 - nbytes. */
int64_t nx_ucx_receive(nx_ucx *engine, uint8_t *data, int64_t room) {
    pthread_mutex_lock(&engine->lock);
    ucx_message *message = engine->messages;
    int64_t result = !message ? -1 : message->nbytes > room ? -2 - message->nbytes : message->nbytes;
    if (result >= 0) {
        engine->messages = message->next;
        if (!engine->messages)
            engine->messages_end = &engine->messages;
        engine->messages_nbytes -= message->nbytes;
    }
    pthread_mutex_unlock(&engine->lock);
    if (result >= 0) {
        memcpy(data, message->data, (size_t)message->nbytes);
        free(message);
    }
    return result;
}

static ucs_status_t ucx_arrived(void *argument, const void *header, size_t n_header, void *data, size_t nbytes,
                                const ucp_am_recv_param_t *param) {
    nx_ucx *engine = argument;
    (void)header;
    (void)n_header;
    /* NIXL sends notifications eagerly, always (its UCX engine sets the EAGER flag): a rendezvous is no notification. */
    if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)
        return UCS_OK;
    ucx_message *message = malloc(sizeof *message + nbytes);
    if (!message)
        return UCS_OK;
    message->next = NULL;
    message->nbytes = (int64_t)nbytes;
    memcpy(message->data, data, nbytes);
    pthread_mutex_lock(&engine->lock);
    int room = engine->messages_nbytes + (int64_t)nbytes <= UCX_MAX_MESSAGES_NBYTES;
    if (room) {
        *engine->messages_end = message;
        engine->messages_end = &message->next;
        engine->messages_nbytes += (int64_t)nbytes;
    }
    pthread_mutex_unlock(&engine->lock);
    if (room)
        ucx_ring(engine);
    else
        free(message);
    return UCS_OK;
}

/* Posting. All below up to the thread's loop runs on the thread. */

static int64_t ucx_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void ucx_unref(nx_ucx_ep *ep) {
    if (__atomic_sub_fetch(&ep->refs, 1, __ATOMIC_ACQ_REL) == 0)
        free(ep);
}

static void ucx_free_op(ucx_op *op) {
    free(op->tokens);
    free(op->local);
    free(op->message);
    free(op->rkeys);
    free(op);
}

static void ucx_request_done(void *request, ucs_status_t status, void *argument) {
    ucx_op *op = argument;
    op->in_flight--;
    if (status != UCS_OK && op->status == UCS_OK)
        op->status = status;
    ucx.ucp_request_free(request);
}

static void ucx_ep_failed(void *argument, ucp_ep_h handle, ucs_status_t status) {
    nx_ucx_ep *ep = argument;
    (void)handle;
    ep->broken = 1;
    if (ep->failed == UCS_OK)
        ep->failed = status;
}

/* Asks UCX by which transports an endpoint goes. Connecting may change them after its first lanes were chosen, so this is done
   again while it is used. Completes -id when they are other ones, and the first time. */
static void ucx_ask_lanes(nx_ucx_ep *ep) {
    ucp_transport_entry_t entries[UCX_MAX_LANES];
    ucp_ep_attr_t attr = {.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS,
                          .transports = {.entries = entries, .num_entries = UCX_MAX_LANES, .entry_size = sizeof *entries}};
    char lanes[UCX_LANES_ROOM] = "";
    int first = !ep->lanes_ns;
    ep->lanes_ns = ucx_clock();
    if (ep->failed == UCS_OK && ucx.ucp_ep_query(ep->ep, &attr) == UCS_OK) {
        size_t n = 0;
        for (unsigned i = 0; i < attr.transports.num_entries && n < sizeof lanes; i++)
            n += (size_t)snprintf(lanes + n, sizeof lanes - n, "%s %s\n", entries[i].transport_name, entries[i].device_name);
    }
    if (!first && !strcmp(lanes, ep->lanes))
        return;
    pthread_mutex_lock(&ep->engine->lock);
    memcpy(ep->lanes, lanes, sizeof lanes);
    pthread_mutex_unlock(&ep->engine->lock);
    ucx_complete(ep->engine, -ep->id, 0);
}

static void ucx_started(ucx_op *op, ucs_status_ptr_t request) {
    if (UCS_PTR_IS_ERR(request))
        op->status = UCS_PTR_STATUS(request);
    else if (request)
        op->in_flight++;
}

#include "ucx_pack.c"

/* Posts more of an op; returns whether it did anything. */
static int ucx_post(ucx_op *op) {
    nx_ucx_ep *ep = op->ep;
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                                 .cb.send = ucx_request_done, .user_data = op};
    /* Copies of host memory may be made while they are posted. */
    int64_t posted = 0, bytes = 0, most = op->vram ? UCX_POST_VRAM_BYTES : UCX_POST_BYTES;
    if (op->message && op->at == 0 && op->status == UCS_OK && !op->cancelled) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
        param.flags = UCP_AM_SEND_FLAG_EAGER;
        op->at = op->n;
        ucx_started(op, ucx.ucp_am_send_nbx(ep->ep, UCX_AM_ID, NULL, 0, op->message, (size_t)op->n_message, &param));
        return 1;
    }
    if (op->tokens)
        return pack_post(op);
    param.op_attr_mask |= UCP_OP_ATTR_FLAG_MULTI_SEND;
    if (op->vram) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
        param.memory_type = UCS_MEMORY_TYPE_CUDA;
    }
    if (op->memh) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
        param.memh = op->memh;
    }
    while (op->at < op->n && op->in_flight < UCX_WINDOW && posted < UCX_POST_SEGMENTS && bytes < most &&
           op->status == UCS_OK && !op->cancelled && ep->failed == UCS_OK) {
        int64_t i = op->at++;
        ucp_rkey_h rkey = op->rkeys[op->index ? op->index[i] : 0];
        void *local = (void *)(uintptr_t)op->local[i];
        size_t nbytes = (size_t)op->lengths[i];
        ucx_started(op, op->put ? ucx.ucp_put_nbx(ep->ep, local, nbytes, (uint64_t)op->remote[i], rkey, &param)
                                : ucx.ucp_get_nbx(ep->ep, local, nbytes, (uint64_t)op->remote[i], rkey, &param));
        posted++;
        bytes += op->lengths[i];
    }
    return posted != 0;
}

/* Moves an op on; returns 1 when it did something, 2 when the op has ended. */
static int ucx_step(ucx_op *op) {
    nx_ucx_ep *ep = op->ep;
    if (ep->failed != UCS_OK && op->status == UCS_OK)
        op->status = ep->failed;
    if (ep->failed != UCS_OK)
        pack_abandon(op);
    int did = ep->closed || ep->closing ? 0 : ucx_post(op);
    int stopped = op->status != UCS_OK || op->cancelled;
    if (op->in_flight || (op->at < op->n && !stopped))
        return did;
    /* A put is at its destination once a flush that began after it has completed; so are puts that were stopped halfway. Packed
       ones have been answered. */
    if (!op->flushing && op->put && op->at && !op->tokens && ep->failed == UCS_OK && !ep->closing && !ep->closed) {
        op->flushing = 1;
        ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                                     .cb.send = ucx_request_done, .user_data = op};
        ucx_started(op, ucx.ucp_ep_flush_nbx(ep->ep, &param));
        if (op->in_flight)
            return 1;
    }
    ucx_complete(ep->engine, op->id, op->status != UCS_OK ? op->status : op->at < op->n ? -1000 : 0);
    return 2;
}

/* Whether an endpoint that was given up is still to send what it has taken. UCX's TCP crashes when its end is closed by force
   with bytes left to send, and the peer closes too: what it reads frees what it writes from (uct_tcp_iface_handle_events in
   src/uct/tcp/tcp_iface.c of UCX 1.21). */
static int ucx_drains(nx_ucx_ep *ep) {
    return ep->failed != UCS_OK && !ep->broken && !ep->flushed && !ep->closing && !ep->closed && ucx_clock() < ep->drain_ns;
}

/* Flushes an endpoint that is to be closed; returns whether it did anything. Closing flushes too, but cannot be cut short then. */
static int ucx_flush(nx_ucx_ep *ep) {
    if (!ep->flush) {
        ucp_request_param_t param = {0};
        ep->flush = ucx.ucp_ep_flush_nbx(ep->ep, &param);
    } else if ((ep->failed == UCS_OK || ucx_drains(ep)) && ucx.ucp_request_check_status(ep->flush) == UCS_INPROGRESS) {
        return 0;
    } else {
        ucx.ucp_request_free(ep->flush);
        ep->flush = NULL;
    }
    if (UCS_PTR_IS_ERR(ep->flush))
        ep->flush = NULL;
    ep->flushed = !ep->flush;
    return 1;
}

static int ucx_step_ep(nx_ucx_ep *ep) {
    int did = 0;
    int stopping = ep->wants_close;
    for (ucx_op *op = ep->ops; op && !stopping; op = op->next)
        stopping = op->cancelled;
    if (!stopping)
        ep->stop_ns = 0;
    /* What a silent peer does not answer would go on for ever: its endpoint is cut, which ends everything on it. */
    if (stopping && (ep->ops || ep->flush) && ep->failed == UCS_OK && ucx_clock() - ep->stop_ns > UCX_GRACE_NS)
        ep->failed = UCS_ERR_TIMED_OUT;
    for (ucx_op **place = &ep->ops; *place;) {
        int result = ucx_step(*place);
        did |= result != 0;
        if (result == 2) {
            ucx_op *op = *place;
            *place = op->next;
            ucx_free_op(op);
            if (ep->failed == UCS_OK && !ep->closing && !ep->closed && ucx_clock() - ep->lanes_ns > UCX_LANES_NS)
                ucx_ask_lanes(ep);
        } else {
            place = &(*place)->next;
        }
    }
    if (ep->failed != UCS_OK && !ep->reported) {
        ep->reported = 1;
        ucx_complete(ep->engine, ep->id, ep->failed);
    }
    if (ep->flush || ucx_drains(ep) ||
        (ep->wants_close && !ep->ops && !ep->flushed && !ep->closing && !ep->closed && ep->failed == UCS_OK))
        did |= ucx_flush(ep);
    /* A failed endpoint is closed by force, which ends what is in flight on it. */
    if (!ucx_drains(ep) && !ep->closing && !ep->closed && (ep->failed != UCS_OK || (ep->wants_close && ep->flushed))) {
        ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                     .flags = ep->failed != UCS_OK ? UCP_EP_CLOSE_FLAG_FORCE : 0};
        /* From here on no rkey is unpacked on it any more: UCX crashes on an endpoint that is gone. */
        pthread_mutex_lock(&ep->engine->close_lock);
        ep->gone = 1;
        pthread_mutex_unlock(&ep->engine->close_lock);
        ep->closing = ucx.ucp_ep_close_nbx(ep->ep, &param);
        did = 1;
        if (!ep->closing || UCS_PTR_IS_ERR(ep->closing)) {
            ep->closing = NULL;
            ep->closed = 1;
        }
    }
    if (ep->closing && ucx.ucp_request_check_status(ep->closing) != UCS_INPROGRESS) {
        ucx.ucp_request_free(ep->closing);
        ep->closing = NULL;
        ep->closed = 1;
        did = 1;
    }
    return did;
}

static void ucx_obey(nx_ucx *engine, ucx_command *command) {
    nx_ucx_ep *ep = command->ep;
    switch (command->kind) {
    case UCX_DO_ADD: {
        ep->next = engine->eps;
        engine->eps = ep;
        ucx_ask_lanes(ep);
        pack_hello(ep);
        break;
    }
    case UCX_DO_SUBMIT: {
        ucx_op **place = &ep->ops;
        if (ep->closed || ep->closing || ep->wants_close) {
            ucx_complete(engine, command->op->id, ep->failed != UCS_OK ? ep->failed : UCS_ERR_NOT_CONNECTED);
            ucx_free_op(command->op);
            break;
        }
        if (!ep->hears) {
            free(command->op->tokens);
            command->op->tokens = NULL;
        }
        while (*place)
            place = &(*place)->next;
        *place = command->op;
        break;
    }
    case UCX_DO_CANCEL:
        for (ucx_op *op = ep->ops; op; op = op->next)
            if (op->id == command->id && !op->cancelled) {
                op->cancelled = 1;
                ep->stop_ns = ep->stop_ns ? ep->stop_ns : ucx_clock();
            }
        break;
    case UCX_DO_CLOSE:
        ep->wants_close = 1;
        ep->stop_ns = ucx_clock();
        break;
    case UCX_DO_FAIL:
        if (ep->failed == UCS_OK && !ep->closing && !ep->closed) {
            ep->failed = UCS_ERR_CONNECTION_RESET;
            ep->drain_ns = ucx_clock() + UCX_DRAIN_NS;
        }
        break;
    case UCX_DO_SETTLE:
        while (ucx.ucp_worker_progress(engine->worker)) {}
        ucx_complete(engine, command->id, 0);
        break;
    case UCX_DO_CUDA: {
        int failed = cuda.cuCtxSetCurrent((void *)(uintptr_t)command->id);
        pthread_mutex_lock(&engine->lock);
        engine->cuda_context = failed ? UINTPTR_MAX : (uintptr_t)command->id;
        pthread_cond_broadcast(&engine->cuda_ready);
        pthread_mutex_unlock(&engine->lock);
        break;
    }
    }
    free(command);
}

/* Steps every endpoint, and drops those that are closed; returns whether anything happened. */
static int ucx_step_all(nx_ucx *engine, int *busy) {
    int did = 0;
    *busy = 0;
    for (nx_ucx_ep **place = &engine->eps; *place;) {
        nx_ucx_ep *ep = *place;
        did |= ucx_step_ep(ep);
        *busy |= ep->ops || ep->flush || ep->closing;
        if (ep->closed && !ep->ops && ep->wants_close) {
            *place = ep->next;
            if (!ep->reported)
                ucx_complete(engine, ep->id, 0);
            else
                ucx_complete(engine, ep->id + 1, 0);
            ucx_unref(ep);
        } else {
            place = &ep->next;
        }
    }
    return did;
}

static void *ucx_run(void *argument) {
    nx_ucx *engine = argument;
    for (;;) {
        pthread_mutex_lock(&engine->lock);
        ucx_command *command = engine->first;
        engine->first = NULL;
        engine->end = &engine->first;
        int stop = engine->stop;
        pthread_mutex_unlock(&engine->lock);
        int did = command != NULL, busy = 0;
        while (command) {
            ucx_command *next = command->next;
            ucx_obey(engine, command);
            command = next;
        }
        if (stop)
            return NULL;
        did |= ucx_step_all(engine, &busy);
        while (ucx.ucp_worker_progress(engine->worker))
            did = 1;
        if (did)
            continue;
        pthread_mutex_lock(&engine->lock);
        int sleeping = engine->first == NULL && !engine->stop;
        engine->sleeping = sleeping;
        pthread_mutex_unlock(&engine->lock);
        if (sleeping && ucx.ucp_worker_arm(engine->worker) == UCS_OK) {
            struct pollfd fds[] = {{.fd = engine->worker_fd, .events = POLLIN}, {.fd = engine->wake_fd, .events = POLLIN}};
            uint64_t drained;
            /* While something is under way a lost event must cost half a second at most, not for ever. */
            poll(fds, 2, busy ? UCX_WATCHDOG_MS : -1);
            if (fds[1].revents)
                while (read(engine->wake_fd, &drained, 8) < 0 && errno == EINTR) {}
        }
        pthread_mutex_lock(&engine->lock);
        engine->sleeping = 0;
        pthread_mutex_unlock(&engine->lock);
    }
}

/* What Python calls. */

static int ucx_post_command(nx_ucx *engine, int kind, nx_ucx_ep *ep, ucx_op *op, int64_t id) {
    ucx_command *command = calloc(1, sizeof *command);
    uint64_t one = 1;
    if (!command)
        return -ENOMEM;
    *command = (ucx_command){.kind = kind, .ep = ep, .op = op, .id = id};
    pthread_mutex_lock(&engine->lock);
    *engine->end = command;
    engine->end = &command->next;
    int wake = engine->sleeping;
    engine->sleeping = 0;
    pthread_mutex_unlock(&engine->lock);
    if (wake)
        while (write(engine->wake_fd, &one, 8) < 0 && errno == EINTR) {}
    return 0;
}

/* Starts the thread that progresses `worker`. `event_fd` (the caller's) is written to when there are completions or messages.
   Returns NULL, and says why, when that cannot be. */
nx_ucx *nx_ucx_open(uintptr_t context, uintptr_t worker, int event_fd, char *why, int64_t n_why, uint64_t identity) {
    nx_ucx *engine = calloc(1, sizeof *engine);
    if (!engine || ucx_load(why, n_why)) {
        free(engine);
        return NULL;
    }
    engine->context = (ucp_context_h)context;
    engine->worker = (ucp_worker_h)worker;
    engine->event_fd = event_fd;
    engine->end = &engine->first;
    engine->messages_end = &engine->messages;
    engine->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    engine->identity = identity;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->regions_lock, NULL);
    pthread_mutex_init(&engine->close_lock, NULL);
    pthread_cond_init(&engine->cuda_ready, NULL);
    ucp_am_handler_param_t handler = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                                                    UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                      .id = UCX_AM_ID, .flags = UCP_AM_FLAG_WHOLE_MSG, .cb = ucx_arrived, .arg = engine};
    ucs_status_t status = ucx.ucp_worker_get_efd(engine->worker, &engine->worker_fd);
    if (status == UCS_OK)
        status = ucx.ucp_worker_set_am_recv_handler(engine->worker, &handler);
    handler.id = PACK_AM_ID;
    handler.cb = pack_arrived;
    if (status == UCS_OK)
        status = ucx.ucp_worker_set_am_recv_handler(engine->worker, &handler);
    sigset_t all, before;
    sigfillset(&all);
    /* Signals are for Python's main thread. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = status != UCS_OK || engine->wake_fd < 0 || pthread_create(&engine->thread, NULL, ucx_run, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        snprintf(why, (size_t)n_why, "%s", status != UCS_OK ? nx_ucx_text(status) : "no thread or file descriptor is left");
        if (engine->wake_fd >= 0)
            close(engine->wake_fd);
        free(engine);
        return NULL;
    }
    pthread_setname_np(engine->thread, "nixl-ucx");
    return engine;
}

/* Ends the thread. Every endpoint has been closed; the worker and context are the caller's. */
void nx_ucx_close(nx_ucx *engine) {
    uint64_t one = 1;
    pthread_mutex_lock(&engine->lock);
    engine->stop = 1;
    pthread_mutex_unlock(&engine->lock);
    while (write(engine->wake_fd, &one, 8) < 0 && errno == EINTR) {}
    pthread_join(engine->thread, NULL);
    ucp_am_handler_param_t handler = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB,
                                      .id = UCX_AM_ID, .cb = NULL};
    ucx.ucp_worker_set_am_recv_handler(engine->worker, &handler);
    handler.id = PACK_AM_ID;
    ucx.ucp_worker_set_am_recv_handler(engine->worker, &handler);
    while (engine->messages) {
        ucx_message *message = engine->messages;
        engine->messages = message->next;
        free(message);
    }
    while (engine->regions)
        pack_drop_region(engine, engine->regions->token);
    close(engine->wake_fd);
    pthread_mutex_destroy(&engine->regions_lock);
    pthread_mutex_destroy(&engine->close_lock);
    pthread_cond_destroy(&engine->cuda_ready);
    pthread_mutex_destroy(&engine->lock);
    free(engine->done);
    free(engine);
}

static int ucx_copy_out(const void *data, size_t nbytes, uint8_t *out, int64_t room, int64_t *n) {
    *n = (int64_t)nbytes;
    if (*n > room)
        return UCS_ERR_BUFFER_TOO_SMALL;
    memcpy(out, data, nbytes);
    return 0;
}

int nx_ucx_address(nx_ucx *engine, uint8_t *out, int64_t room, int64_t *n) {
    ucp_address_t *address;
    size_t nbytes;
    ucs_status_t status = ucx.ucp_worker_get_address(engine->worker, &address, &nbytes);
    if (status != UCS_OK)
        return status;
    int result = ucx_copy_out(address, nbytes, out, room, n);
    ucx.ucp_worker_release_address(engine->worker, address);
    return result;
}

/* Whether this UCX handles a CUDA device's memory: it was built with CUDA, and its transports found a driver. */
int nx_ucx_takes_cuda(nx_ucx *engine) {
    ucp_context_attr_t attr = {.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES};
    return ucx.ucp_context_query(engine->context, &attr) == UCS_OK && (attr.memory_types & (1ull << UCS_MEMORY_TYPE_CUDA));
}

/* Makes a CUcontext current on the thread, for good; later calls with another one leave the first. Blocks until that is done.
   UCX's CUDA transports query events where they progress and arm, which crashes without a context. Returns 0, or -1. */
int nx_ucx_use_cuda(nx_ucx *engine, uintptr_t context) {
    if (cuda_load())
        return -1;
    pthread_mutex_lock(&engine->lock);
    int known = engine->cuda_context != 0;
    pthread_mutex_unlock(&engine->lock);
    if (!known && ucx_post_command(engine, UCX_DO_CUDA, NULL, NULL, (int64_t)context))
        return -1;
    pthread_mutex_lock(&engine->lock);
    while (!engine->cuda_context)
        pthread_cond_wait(&engine->cuda_ready, &engine->lock);
    int failed = engine->cuda_context == UINTPTR_MAX;
    pthread_mutex_unlock(&engine->lock);
    return failed ? -1 : 0;
}

/* Registers memory and packs the key that peers need for it. Host memory, `context` 0: `token` is what they show to have it served
   in packs. A device's memory, with a CUcontext of that device after nx_ucx_use_cuda: never in packs, which the CPU copies. */
int nx_ucx_map(nx_ucx *engine, int64_t address, int64_t nbytes, uint64_t token, uintptr_t context, void **memory, uint8_t *key,
               int64_t room, int64_t *n) {
    ucp_mem_map_params_t params = {.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
                                   .address = (void *)(uintptr_t)address, .length = (size_t)nbytes};
    if (context) {
        params.field_mask |= UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
        params.memory_type = UCS_MEMORY_TYPE_CUDA;
    }
    ucp_mem_h handle;
    int entered = cuda_enter(context);
    ucs_status_t status = ucx.ucp_mem_map(engine->context, &params, &handle);
    void *packed;
    size_t n_packed;
    int mapped = status == UCS_OK;
    if (mapped)
        status = ucx.ucp_rkey_pack(engine->context, handle, &packed, &n_packed);
    int result = status;
    if (status == UCS_OK) {
        result = ucx_copy_out(packed, n_packed, key, room, n);
        ucx.ucp_rkey_buffer_release(packed);
    }
    if (!result && !context && pack_add_region(engine, address, nbytes, token))
        result = UCS_ERR_NO_MEMORY;
    if (result && mapped)
        ucx.ucp_mem_unmap(engine->context, handle);
    cuda_leave(entered);
    *memory = result ? NULL : handle;
    return result;
}

int nx_ucx_unmap(nx_ucx *engine, void *memory, uint64_t token) {
    pack_drop_region(engine, token);
    return ucx.ucp_mem_unmap(engine->context, memory);
}

/* Makes an endpoint to a worker address, which must be whole: UCX does not check it. `id` completes with a UCX error when the
   endpoint fails, or 0 when nx_ucx_disconnect has closed it; after a failure `id + 1` completes when it is closed. `-id` completes
   when nx_ucx_lanes has an answer, and again with each other one. `identity` is what the peer gave nx_ucx_open, 0 if it is no agent
   of ours. */
nx_ucx_ep *nx_ucx_connect(nx_ucx *engine, const uint8_t *address, int64_t id, uint64_t identity, int *status) {
    nx_ucx_ep *ep = calloc(1, sizeof *ep);
    if (!ep) {
        *status = UCS_ERR_NO_MEMORY;
        return NULL;
    }
    ep->engine = engine;
    ep->id = id;
    ep->identity = identity;
    ep->refs = 2;
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address = (const ucp_address_t *)address,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {.cb = ucx_ep_failed, .arg = ep}};
    *status = ucx.ucp_ep_create(engine->worker, &params, &ep->ep);
    if (*status != UCS_OK || ucx_post_command(engine, UCX_DO_ADD, ep, NULL, 0)) {
        free(ep);
        return NULL;
    }
    return ep;
}

int nx_ucx_disconnect(nx_ucx_ep *ep) { return ucx_post_command(ep->engine, UCX_DO_CLOSE, ep, NULL, 0); }

/* Lets the endpoint fail as if the network had: what is on it fails, and it is closed by force. */
int nx_ucx_fail(nx_ucx_ep *ep) { return ucx_post_command(ep->engine, UCX_DO_FAIL, ep, NULL, 0); }

/* `id` completes when all that had arrived before has been taken: copied to where it belongs, or dropped with its endpoint. */
int nx_ucx_settle(nx_ucx *engine, int64_t id) { return ucx_post_command(engine, UCX_DO_SETTLE, NULL, NULL, id); }

/* Gives up the pointer, once the endpoint has closed. */
void nx_ucx_forget(nx_ucx_ep *ep) { ucx_unref(ep); }

/* `context`: a CUcontext for a key of a device's memory, which opens that memory here; 0 for others. */
void *nx_ucx_rkey(nx_ucx_ep *ep, const uint8_t *key, uintptr_t context, int *status) {
    ucp_rkey_h rkey = NULL;
    int entered = cuda_enter(context);
    pthread_mutex_lock(&ep->engine->close_lock);
    *status = ep->gone ? UCS_ERR_NOT_CONNECTED : ucx.ucp_ep_rkey_unpack(ep->ep, key, &rkey);
    pthread_mutex_unlock(&ep->engine->close_lock);
    cuda_leave(entered);
    return *status == UCS_OK ? rkey : NULL;
}

void nx_ucx_rkey_free(void *rkey) { ucx.ucp_rkey_destroy(rkey); }

/* Queues a copy of `n` segments: segment i between local[i] and remote[i], which the rkey rkeys[index[i]] opens. With the regions'
   `tokens` (or NULL) the segments are packed into messages if the peer takes those. `vram`: the local side is a device's memory,
   all of it that which nx_ucx_map returned `memory` for, if given. */
int nx_ucx_submit(nx_ucx_ep *ep, int64_t id, int put, int64_t n, const int64_t *local, const int64_t *remote,
                  const int64_t *lengths, const int64_t *index, void **rkeys, const uint64_t *tokens, int vram, void *memory) {
    ucx_op *op = calloc(1, sizeof *op);
    int64_t n_keys = 1;
    for (int64_t i = 0; index && i < n; i++)
        n_keys = index[i] >= n_keys ? index[i] + 1 : n_keys;
    int64_t *arrays = malloc((size_t)(index ? 4 : 3) * (size_t)n * sizeof *arrays);
    void **keys = malloc((size_t)n_keys * sizeof *keys);
    uint64_t *shown = tokens ? malloc((size_t)n_keys * sizeof *shown) : NULL;
    if (!op || !arrays || !keys || (tokens && !shown)) {
        free(op);
        free(shown);
        free(arrays);
        free(keys);
        return -ENOMEM;
    }
    size_t nbytes = (size_t)n * sizeof *arrays;
    *op = (ucx_op){.ep = ep, .id = id, .n = n, .put = put, .local = arrays, .remote = arrays + n, .lengths = arrays + 2 * n,
                   .index = index ? arrays + 3 * n : NULL, .rkeys = keys, .tokens = shown, .n_keys = n_keys,
                   .vram = vram, .memh = memory};
    if (shown)
        memcpy(shown, tokens, (size_t)n_keys * sizeof *shown);
    memcpy(op->local, local, nbytes);
    memcpy(op->remote, remote, nbytes);
    memcpy(op->lengths, lengths, nbytes);
    if (index)
        memcpy(op->index, index, nbytes);
    memcpy(keys, rkeys, (size_t)n_keys * sizeof *keys);
    if (ucx_post_command(ep->engine, UCX_DO_SUBMIT, ep, op, id)) {
        ucx_free_op(op);
        return -ENOMEM;
    }
    return 0;
}

/* Posts no more of a copy; it completes when what was posted is quiet. */
int nx_ucx_cancel(nx_ucx_ep *ep, int64_t id) { return ucx_post_command(ep->engine, UCX_DO_CANCEL, ep, NULL, id); }

/* Sends an active message, eagerly. */
int nx_ucx_send(nx_ucx_ep *ep, int64_t id, const uint8_t *data, int64_t nbytes) {
    ucx_op *op = calloc(1, sizeof *op);
    char *message = malloc((size_t)nbytes + 1);
    if (!op || !message) {
        free(op);
        free(message);
        return -ENOMEM;
    }
    memcpy(message, data, (size_t)nbytes);
    *op = (ucx_op){.ep = ep, .id = id, .n = 1, .message = message, .n_message = nbytes};
    if (ucx_post_command(ep->engine, UCX_DO_SUBMIT, ep, op, id)) {
        ucx_free_op(op);
        return -ENOMEM;
    }
    return 0;
}

int nx_ucx_packs(nx_ucx_ep *ep) { return __atomic_load_n(&ep->hears, __ATOMIC_RELAXED); }

/* Tells by which transports an endpoint goes, "transport device" a line; empty where UCX does not know. */
int nx_ucx_lanes(nx_ucx_ep *ep, uint8_t *out, int64_t room, int64_t *n) {
    pthread_mutex_lock(&ep->engine->lock);
    int result = ucx_copy_out(ep->lanes, strlen(ep->lanes), out, room, n);
    pthread_mutex_unlock(&ep->engine->lock);
    return result;
}

/* Tells the version of the libucp that this process has loaded, a space, and its file. Fails where it has loaded none. */
int nx_ucx_library(uint8_t *out, int64_t room, int64_t *n) {
    char why[256], text[4096];
    Dl_info found;
    if (!ucx.ucp_get_version_string && ucx_load(why, sizeof why))
        return UCS_ERR_NO_RESOURCE;
    if (!dladdr((void *)ucx.ucp_get_version_string, &found) || !found.dli_fname)
        found.dli_fname = "";
    snprintf(text, sizeof text, "%s %s", ucx.ucp_get_version_string(), found.dli_fname);
    return ucx_copy_out(text, strlen(text), out, room, n);
}
