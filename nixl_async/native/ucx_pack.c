/* Small pages between two of our agents: many of them travel as one active message, which the other side's engine thread
   scatters, or gathers in answer. Part of the unit ucx.c.

   One-sided operations cost UCX a microsecond or more each, and over its TCP several; a message costs that once. The side that
   owns the memory checks every range against what is registered, by the token that came with the region's key. A side sends
   such messages only to an endpoint whose peer has said (PACK_HELLO) that it has an endpoint to answer over. */
#define PACK_AM_ID 1
#define PACK_MAGIC 0x3170786eu
#define PACK_BYTES (256 << 10)
#define PACK_SEGMENTS 4096
#define PACK_CHUNKS 4
#define PACK_MAX_REPLIES_NBYTES (256ll << 20)

enum { PACK_HELLO, PACK_PUT, PACK_GET, PACK_DONE };

typedef struct {
    uint32_t magic;
    uint8_t kind, status;
    uint16_t zero;
    uint32_t n_segments, n_keys;
    uint64_t from, id, nbytes;
} pack_header;

typedef struct {
    uint64_t address;
    uint32_t nbytes, key;
} pack_segment;

_Static_assert(sizeof(pack_header) == 40 && sizeof(pack_segment) == 16, "messages have no padding");

typedef struct ucx_region {
    struct ucx_region *next;
    uint64_t address, nbytes, token;
} ucx_region;

/* A message of an op: `sending` until UCX is done with it, `waiting` until its answer has come. */
struct ucx_chunk {
    ucx_chunk *next;
    ucx_op *op;
    int64_t first, n;
    int sending, waiting;
    pack_header header;
    char data[];
};

typedef struct {
    nx_ucx *engine;
    int64_t nbytes;
    pack_header header;
    char data[];
} pack_reply;

static void pack_settle(ucx_chunk *chunk) {
    if (chunk->sending || chunk->waiting)
        return;
    ucx_chunk **place = &chunk->op->chunks;
    while (*place != chunk)
        place = &(*place)->next;
    *place = chunk->next;
    chunk->op->n_chunks--;
    free(chunk);
}

static void pack_answered(ucx_chunk *chunk) {
    if (chunk->waiting) {
        chunk->waiting = 0;
        chunk->op->in_flight--;
    }
    pack_settle(chunk);
}

static void pack_sent(void *request, ucs_status_t status, void *argument) {
    ucx_chunk *chunk = argument;
    if (request)
        ucx.ucp_request_free(request);
    chunk->sending = 0;
    chunk->op->in_flight--;
    if (status == UCS_OK) {
        pack_settle(chunk);
    } else {
        if (chunk->op->status == UCS_OK)
            chunk->op->status = status;
        pack_answered(chunk);
    }
}

/* What awaits an answer from an endpoint that has failed will have none. */
static void pack_abandon(ucx_op *op) {
    for (ucx_chunk *chunk = op->chunks, *next; chunk; chunk = next) {
        next = chunk->next;
        pack_answered(chunk);
    }
}

/* Sends what an op may send now; returns whether it did anything. */
static int pack_post(ucx_op *op) {
    nx_ucx_ep *ep = op->ep;
    int did = 0;
    while (op->at < op->n && op->n_chunks < PACK_CHUNKS && op->status == UCS_OK && !op->cancelled && ep->failed == UCS_OK) {
        int64_t n = 0, nbytes = 0, first = op->at;
        while (first + n < op->n && n < PACK_SEGMENTS && (n == 0 || nbytes + op->lengths[first + n] <= PACK_BYTES))
            nbytes += op->lengths[first + n++];
        size_t n_table = 8 * (size_t)op->n_keys + sizeof(pack_segment) * (size_t)n;
        ucx_chunk *chunk = malloc(sizeof *chunk + n_table + (op->put ? (size_t)nbytes : 0));
        if (!chunk) {
            op->status = UCS_ERR_NO_MEMORY;
            break;
        }
        *chunk = (ucx_chunk){.next = op->chunks, .op = op, .first = first, .n = n, .sending = 1, .waiting = 1};
        chunk->header = (pack_header){.magic = PACK_MAGIC, .kind = op->put ? PACK_PUT : PACK_GET, .n_segments = (uint32_t)n,
                                      .n_keys = (uint32_t)op->n_keys, .from = ep->engine->identity,
                                      .id = ++ep->engine->last_chunk, .nbytes = (uint64_t)nbytes};
        memcpy(chunk->data, op->tokens, 8 * (size_t)op->n_keys);
        char *at = chunk->data + 8 * op->n_keys, *payload = chunk->data + n_table;
        for (int64_t i = first; i < first + n; i++, at += sizeof(pack_segment)) {
            pack_segment segment = {(uint64_t)op->remote[i], (uint32_t)op->lengths[i], op->index ? (uint32_t)op->index[i] : 0};
            memcpy(at, &segment, sizeof segment);
            if (op->put) {
                memcpy(payload, (void *)(uintptr_t)op->local[i], (size_t)op->lengths[i]);
                payload += op->lengths[i];
            }
        }
        op->at += n;
        op->chunks = chunk;
        op->n_chunks++;
        op->in_flight += 2;
        did = 1;
        ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                                     UCP_OP_ATTR_FIELD_FLAGS,
                                     .cb.send = pack_sent, .user_data = chunk, .flags = UCP_AM_SEND_FLAG_EAGER};
        ucs_status_ptr_t request = ucx.ucp_am_send_nbx(ep->ep, PACK_AM_ID, &chunk->header, sizeof chunk->header, chunk->data,
                                                       n_table + (op->put ? (size_t)nbytes : 0), &param);
        if (!UCS_PTR_IS_PTR(request))
            pack_sent(NULL, UCS_PTR_STATUS(request), chunk);
    }
    return did;
}

static void pack_reply_sent(void *request, ucs_status_t status, void *argument) {
    pack_reply *reply = argument;
    (void)status;
    if (request)
        ucx.ucp_request_free(request);
    reply->engine->replies_nbytes -= reply->nbytes;
    free(reply);
}

static void pack_send_reply(nx_ucx_ep *ep, pack_reply *reply) {
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                                 UCP_OP_ATTR_FIELD_FLAGS,
                                 .cb.send = pack_reply_sent, .user_data = reply, .flags = UCP_AM_SEND_FLAG_EAGER};
    reply->engine->replies_nbytes += reply->nbytes;
    ucs_status_ptr_t request = ucx.ucp_am_send_nbx(ep->ep, PACK_AM_ID, &reply->header, sizeof reply->header, reply->data,
                                                   (size_t)reply->nbytes, &param);
    if (!UCS_PTR_IS_PTR(request))
        pack_reply_sent(NULL, UCS_PTR_STATUS(request), reply);
}

static pack_reply *pack_new_reply(nx_ucx *engine, int kind, uint64_t id, int64_t nbytes) {
    pack_reply *reply = malloc(sizeof *reply + (size_t)nbytes);
    if (reply) {
        reply->engine = engine;
        reply->nbytes = nbytes;
        reply->header = (pack_header){.magic = PACK_MAGIC, .kind = (uint8_t)kind, .from = engine->identity, .id = id,
                                      .nbytes = (uint64_t)nbytes};
    }
    return reply;
}

/* Tells the peer of an endpoint that it can be answered. */
static void pack_hello(nx_ucx_ep *ep) {
    pack_reply *hello = ep->identity ? pack_new_reply(ep->engine, PACK_HELLO, 0, 0) : NULL;
    if (hello)
        pack_send_reply(ep, hello);
}

static const ucx_region *pack_find(nx_ucx *engine, uint64_t token, pack_segment segment) {
    for (const ucx_region *region = engine->regions; region; region = region->next)
        if (region->token == token)
            return segment.address >= region->address && segment.nbytes <= region->nbytes &&
                           segment.address - region->address <= region->nbytes - segment.nbytes
                       ? region
                       : NULL;
    return NULL;
}

/* Serves a peer's request from `data`; returns whether every range was ours to serve. With `out`, gathers into it. */
static int pack_serve(nx_ucx *engine, const pack_header *header, const char *data, char *out) {
    const char *table = data + 8ul * header->n_keys, *payload = table + sizeof(pack_segment) * header->n_segments;
    uint64_t token, nbytes = 0;
    pack_segment segment;
    for (int copying = 0; copying < 2; copying++) {
        for (uint32_t i = 0; i < header->n_segments; i++) {
            memcpy(&segment, table + sizeof segment * i, sizeof segment);
            if (copying) {
                char *memory = (char *)(uintptr_t)segment.address;
                memcpy(out ? out + nbytes : memory, out ? memory : payload + nbytes, segment.nbytes);
            } else {
                if (segment.key >= header->n_keys)
                    return 0;
                memcpy(&token, data + 8ul * segment.key, 8);
                if (!pack_find(engine, token, segment))
                    return 0;
            }
            nbytes += segment.nbytes;
        }
        if (nbytes != header->nbytes)
            return 0;
        nbytes = 0;
    }
    return 1;
}

static void pack_take_answer(nx_ucx_ep *ep, const pack_header *header, const char *data, size_t nbytes) {
    for (ucx_op *op = ep->ops; op; op = op->next)
        for (ucx_chunk *chunk = op->chunks; chunk; chunk = chunk->next) {
            if (chunk->header.id != header->id || !chunk->waiting)
                continue;
            if (header->status) {
                op->status = op->status == UCS_OK ? UCS_ERR_INVALID_PARAM : op->status;
            } else if (!op->put) {
                if (nbytes != chunk->header.nbytes) {
                    op->status = UCS_ERR_IO_ERROR;
                } else {
                    for (int64_t i = chunk->first; i < chunk->first + chunk->n; data += op->lengths[i++])
                        memcpy((void *)(uintptr_t)op->local[i], data, (size_t)op->lengths[i]);
                }
            }
            pack_answered(chunk);
            return;
        }
}

static ucs_status_t pack_arrived(void *argument, const void *raw, size_t n_header, void *data, size_t nbytes,
                                 const ucp_am_recv_param_t *param) {
    nx_ucx *engine = argument;
    pack_header header;
    if (n_header != sizeof header || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV))
        return UCS_OK;
    memcpy(&header, raw, sizeof header);
    if (header.magic != PACK_MAGIC)
        return UCS_OK;
    nx_ucx_ep *ep = engine->eps;
    while (ep && (ep->identity != header.from || ep->wants_close || ep->closing || ep->closed || ep->failed != UCS_OK))
        ep = ep->next;
    if (header.kind == PACK_HELLO) {
        /* Ours to it may not be there yet: then it is told by the greeting that ours sends, and greets again. */
        if (ep && !ep->hears) {
            ep->hears = 1;
            pack_hello(ep);
        }
        return UCS_OK;
    }
    /* Without an endpoint the peer has left, or is a stranger: nothing is served. */
    if (!ep)
        return UCS_OK;
    if (header.kind == PACK_DONE) {
        pack_take_answer(ep, &header, data, nbytes);
        return UCS_OK;
    }
    uint64_t n_table = 8ull * header.n_keys + sizeof(pack_segment) * (uint64_t)header.n_segments;
    int put = header.kind == PACK_PUT;
    int whole = header.n_segments <= PACK_SEGMENTS && nbytes >= n_table && (!put || nbytes - n_table == header.nbytes) &&
                (put || header.nbytes <= (uint64_t)(PACK_MAX_REPLIES_NBYTES - engine->replies_nbytes));
    pack_reply *reply = pack_new_reply(engine, PACK_DONE, header.id, whole && !put ? (int64_t)header.nbytes : 0);
    if (!reply)
        return UCS_OK;
    /* Held while bytes move: a region is unregistered before or after. */
    pthread_mutex_lock(&engine->regions_lock);
    if (!whole || !pack_serve(engine, &header, data, put ? NULL : reply->data)) {
        reply->header.status = 1;
        reply->nbytes = 0;
    }
    pthread_mutex_unlock(&engine->regions_lock);
    pack_send_reply(ep, reply);
    return UCS_OK;
}

/* What is registered. */

static int pack_add_region(nx_ucx *engine, int64_t address, int64_t nbytes, uint64_t token) {
    ucx_region *region = malloc(sizeof *region);
    if (!region)
        return -1;
    pthread_mutex_lock(&engine->regions_lock);
    *region = (ucx_region){engine->regions, (uint64_t)address, (uint64_t)nbytes, token};
    engine->regions = region;
    pthread_mutex_unlock(&engine->regions_lock);
    return 0;
}

/* By its token: UCX may have given one handle for two mappings of the same memory. */
static void pack_drop_region(nx_ucx *engine, uint64_t token) {
    pthread_mutex_lock(&engine->regions_lock);
    ucx_region **place = &engine->regions;
    while (*place && (*place)->token != token)
        place = &(*place)->next;
    ucx_region *found = *place;
    if (found)
        *place = found->next;
    pthread_mutex_unlock(&engine->regions_lock);
    free(found);
}
