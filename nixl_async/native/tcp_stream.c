/* One connection of the socket engine: sending its queue, and the state machine for what arrives. Part of the unit tcp.c.
   Everything here runs with the stream's lock held. A negative result means: close this stream. */

static int tcp_sends_memory(const tcp_frame *frame) { return frame->header.kind == TCP_PUT || frame->header.kind == TCP_DATA; }

/* Steps over `n` bytes of the frame's memory. */
static void tcp_advance(tcp_frame *frame, size_t n) {
    frame->left -= n;
    while (n) {
        struct iovec *iov = &frame->iov[frame->at].iov;
        if (n < iov->iov_len) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= n;
            return;
        }
        n -= iov->iov_len;
        frame->at++;
    }
}

/* Copies what was received in one piece to the frame's next memory. */
static void tcp_spread(tcp_frame *frame, const char *data, size_t n) {
    while (n) {
        struct iovec *iov = &frame->iov[frame->at].iov;
        size_t piece = n < iov->iov_len ? n : iov->iov_len;
        copy_past_cache(iov->iov_base, data, piece);
        tcp_advance(frame, piece);
        data += piece;
        n -= piece;
    }
    past_cache_done();
}

/* Adds the frame's next memory to `out`, up to `limit` bytes; returns how many were added. */
static size_t tcp_gather(const tcp_frame *frame, struct iovec *out, int *n_out, int max, size_t limit) {
    size_t bytes = 0;
    for (int64_t i = frame->at; i < frame->n_iov && *n_out < max && bytes < limit; i++) {
        struct iovec piece = frame->iov[i].iov;
        if (piece.iov_len > limit - bytes)
            piece.iov_len = limit - bytes;
        out[(*n_out)++] = piece;
        bytes += piece.iov_len;
    }
    return bytes;
}

static void tcp_sent(nx_tcp_stream *stream, size_t n) {
    nx_tcp *engine = stream->loop->engine;
    stream->moved += n;
    while (stream->queue.first) {
        tcp_frame *frame = stream->queue.first;
        size_t piece = frame->n_head - frame->head_done;
        if (piece > n)
            piece = n;
        frame->head_done += piece;
        n -= piece;
        if (frame->head_done < frame->n_head)
            return;
        if (tcp_sends_memory(frame)) {
            piece = n < frame->left ? n : frame->left;
            tcp_advance(frame, piece);
            n -= piece;
            if (frame->left)
                return;
        }
        tcp_pop(&stream->queue);
        if (stream->ours) {
            tcp_push(&stream->waiting, frame);
        } else {
            stream->requests--;
            tcp_free(engine, frame);
        }
        if (!n)
            return;
    }
}

/* Sends what is queued, until the socket is full, nothing is left, or `budget` bytes are through. Returns whether the budget
   was what ended it. */
static int tcp_send(nx_tcp_stream *stream, size_t budget) {
    struct iovec iov[TCP_IOV];
    while (stream->writable && stream->queue.first && budget) {
        int n = 0, begun = 0;
        size_t bytes = 0, limit = budget < TCP_CHUNK ? budget : TCP_CHUNK;
        for (tcp_frame *frame = stream->queue.first; frame && n < TCP_IOV - 1 && bytes < limit; frame = frame->next) {
            if (stream->ours && frame->head_done == 0) {
                /* The other side closes the stream when it has more unanswered requests than credits. */
                if (stream->requests + begun >= TCP_CREDITS)
                    break;
                begun++;
            }
            if (frame->head_done < frame->n_head) {
                iov[n++] = (struct iovec){(char *)(uintptr_t)frame->head + frame->head_done, frame->n_head - frame->head_done};
                bytes += frame->n_head - frame->head_done;
            }
            if (tcp_sends_memory(frame) && bytes < limit)
                bytes += tcp_gather(frame, iov, &n, TCP_IOV, limit - bytes);
            if (tcp_sends_memory(frame) && bytes >= limit)
                break;
        }
        if (!n)
            return 0;
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)n};
        ssize_t sent = sendmsg(stream->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN)
                return -errno;
            stream->writable = 0;
            return 0;
        }
        if (stream->ours) {
            size_t through = (size_t)sent;
            for (tcp_frame *frame = stream->queue.first; frame && through; frame = frame->next) {
                size_t whole = frame->n_head - frame->head_done + (tcp_sends_memory(frame) ? frame->left : 0);
                stream->requests += frame->head_done == 0;
                through -= through < whole ? through : whole;
            }
        }
        tcp_sent(stream, (size_t)sent);
        budget -= (size_t)sent < budget ? (size_t)sent : budget;
    }
    return stream->writable && stream->queue.first && (!stream->ours || stream->requests < TCP_CREDITS);
}

/* Reports the end of a request of ours. */
static void tcp_ended_request(nx_tcp_stream *stream, int64_t id, int64_t status) {
    if (stream->now == id) {
        stream->now = 0;
        stream->now_status = status;
    } else {
        tcp_complete(stream->loop->engine, id, status);
    }
}

static void tcp_answer(nx_tcp_stream *stream, tcp_frame *frame, int kind, int status) {
    if (kind != TCP_DATA) {
        tcp_release(stream->loop->engine, frame);
        frame->header.nbytes = 0;
        frame->left = 0;
    }
    frame->header.kind = (uint8_t)kind;
    frame->header.status = (uint8_t)status;
    frame->header.n_segments = frame->header.n_keys = 0;
    frame->head = (const char *)&frame->header;
    frame->n_head = sizeof frame->header;
    frame->head_done = 0;
    tcp_push(&stream->queue, frame);
}

static int tcp_got_hello(nx_tcp_stream *stream, const char *stage, size_t n) {
    nx_tcp *engine = stream->loop->engine;
    tcp_hello hello;
    if (n < sizeof hello)
        return 0;
    memcpy(&hello, stage, sizeof hello);
    if (memcmp(hello.magic, TCP_HELLO, 8) || hello.zero || hello.n_identity > TCP_MAX_IDENTITY)
        return -EACCES;
    if (n < sizeof hello + hello.n_identity)
        return 0;
    stream->guest = tcp_recognise(engine, stage + sizeof hello, hello.n_identity, hello.token);
    if (!stream->guest)
        return -EACCES;
    tcp_frame *frame = calloc(1, sizeof *frame);
    if (!frame)
        return -ENOMEM;
    memcpy(stream->identity, stage + sizeof hello, hello.n_identity);
    stream->n_identity = hello.n_identity;
    stream->stage_at += sizeof hello + hello.n_identity;
    stream->phase = RX_HEAD;
    tcp_stranger_went(engine, stream);
    frame->header.magic = TCP_MAGIC;
    stream->requests++;
    tcp_answer(stream, frame, TCP_ACK, 0);
    return 1;
}

/* A reply's header arrived for the oldest request. */
static int tcp_got_reply(nx_tcp_stream *stream) {
    nx_tcp *engine = stream->loop->engine;
    tcp_header *rx = &stream->rx;
    tcp_frame *frame = stream->waiting.first;
    if (!frame || frame->header.id != rx->id || rx->n_segments || rx->n_keys)
        return -EBADMSG;
    int put = frame->header.kind == TCP_PUT;
    if (rx->kind == TCP_DATA && !put && rx->nbytes == frame->header.nbytes && rx->status == 0) {
        stream->rx_frame = tcp_pop(&stream->waiting);
        stream->phase = RX_PAYLOAD;
        return 1;
    }
    if (rx->nbytes || !((rx->kind == TCP_ACK && put && !rx->status) || (rx->kind == TCP_REFUSED && rx->status)))
        return -EBADMSG;
    tcp_pop(&stream->waiting);
    stream->requests--;
    tcp_free(engine, frame);
    tcp_ended_request(stream, (int64_t)rx->id, rx->status);
    return 1;
}

static int tcp_got_request(nx_tcp_stream *stream) {
    tcp_header *rx = &stream->rx;
    if ((rx->kind != TCP_PUT && rx->kind != TCP_GET) || rx->status || rx->nbytes == 0 || rx->nbytes > TCP_MAX_OP ||
        rx->n_segments == 0 || rx->n_segments > TCP_MAX_SEGMENTS || rx->n_keys == 0 || rx->n_keys > rx->n_segments ||
        ++stream->requests > TCP_CREDITS + 1)
        return -EBADMSG;
    tcp_frame *frame = calloc(1, sizeof *frame);
    size_t nbytes = 8ul * rx->n_keys + sizeof(tcp_entry) * rx->n_segments;
    char *memory = malloc(nbytes);
    if (!frame || !memory) {
        free(frame);
        free(memory);
        return -ENOMEM;
    }
    frame->header = *rx;
    frame->memory = memory;
    frame->iov = (tcp_entry *)(void *)(memory + 8ul * rx->n_keys);
    frame->n_iov = rx->n_segments;
    frame->left = rx->nbytes;
    stream->rx_frame = frame;
    stream->rx_table = memory;
    stream->rx_table_nbytes = nbytes;
    stream->rx_table_done = 0;
    stream->phase = RX_TABLE;
    return 1;
}

static int tcp_got_table(nx_tcp_stream *stream) {
    nx_tcp *engine = stream->loop->engine;
    tcp_frame *frame = stream->rx_frame;
    uint64_t total = 0;
    for (int64_t i = 0; i < frame->n_iov; i++) {
        tcp_entry entry = frame->iov[i];
        if (entry.segment.key >= frame->header.n_keys || entry.segment.nbytes == 0)
            return -EBADMSG;
        total += entry.segment.nbytes;
    }
    if (total != frame->header.nbytes)
        return -EBADMSG;
    int status = tcp_admit(engine, stream->guest, frame);
    if (frame->header.kind == TCP_PUT && !status) {
        stream->phase = RX_PAYLOAD;
    } else if (frame->header.kind == TCP_PUT) {
        stream->phase = RX_DISCARD;
        stream->rx_discard = total;
        stream->rx_status = (uint8_t)status;
    } else {
        stream->rx_frame = NULL;
        stream->phase = RX_HEAD;
        if (!status)
            __atomic_fetch_add(&engine->read_nbytes, (int64_t)total, __ATOMIC_RELAXED);
        tcp_answer(stream, frame, status ? TCP_REFUSED : TCP_DATA, status);
    }
    return 1;
}

static void tcp_got_payload(nx_tcp_stream *stream, int status) {
    nx_tcp *engine = stream->loop->engine;
    tcp_frame *frame = stream->rx_frame;
    stream->rx_frame = NULL;
    stream->phase = RX_HEAD;
    if (stream->ours) {
        stream->requests--;
        tcp_ended_request(stream, (int64_t)frame->header.id, 0);
        tcp_free(engine, frame);
    } else {
        if (!status)
            __atomic_fetch_add(&engine->written_nbytes, (int64_t)frame->header.nbytes, __ATOMIC_RELAXED);
        tcp_answer(stream, frame, status ? TCP_REFUSED : TCP_ACK, status);
    }
}

/* Takes what the stage holds as far as it goes. */
static int tcp_parse(nx_tcp_stream *stream) {
    for (;;) {
        char *stage = stream->stage + stream->stage_at;
        size_t n = stream->stage_end - stream->stage_at;
        int result = 1;
        if (stream->phase == RX_PAYLOAD) {
            tcp_frame *frame = stream->rx_frame;
            while (n && frame->left) {
                struct iovec *iov = &frame->iov[frame->at].iov;
                size_t piece = n < iov->iov_len ? n : iov->iov_len;
                memcpy(iov->iov_base, stage, piece);
                tcp_advance(frame, piece);
                stage += piece;
                n -= piece;
                stream->stage_at += piece;
            }
            if (frame->left)
                return 0;
            tcp_got_payload(stream, 0);
        } else if (stream->phase == RX_DISCARD) {
            size_t piece = n < stream->rx_discard ? n : stream->rx_discard;
            stream->stage_at += piece;
            stream->rx_discard -= piece;
            if (stream->rx_discard)
                return 0;
            tcp_got_payload(stream, stream->rx_status);
        } else if (stream->phase == RX_TABLE) {
            size_t piece = stream->rx_table_nbytes - stream->rx_table_done;
            if (piece > n)
                piece = n;
            memcpy(stream->rx_table + stream->rx_table_done, stage, piece);
            stream->stage_at += piece;
            stream->rx_table_done += piece;
            if (stream->rx_table_done < stream->rx_table_nbytes)
                return 0;
            result = tcp_got_table(stream);
        } else if (stream->phase == RX_HELLO) {
            result = tcp_got_hello(stream, stage, n);
        } else {
            if (n < sizeof stream->rx)
                return 0;
            memcpy(&stream->rx, stage, sizeof stream->rx);
            stream->stage_at += sizeof stream->rx;
            if (stream->rx.magic != TCP_MAGIC || stream->rx.zero)
                return -EBADMSG;
            result = stream->ours ? tcp_got_reply(stream) : tcp_got_request(stream);
        }
        if (result <= 0)
            return result;
    }
}

/* Whether the other side is known to be gone. Asked before bytes of a peer's PUT are written after a pause: a process that was
   stopped (SIGSTOP) must not write what is left in its socket when the sender gave that op up long ago. */
static int tcp_is_stale(nx_tcp_stream *stream) {
    int64_t now = tcp_clock();
    int paused = now - stream->last_rx_ns > TCP_STALE_NS;
    stream->last_rx_ns = now;
    if (!paused)
        return 0;
    struct pollfd one = {.fd = stream->fd};
    return poll(&one, 1, 0) > 0 && (one.revents & (POLLERR | POLLHUP));
}

/* Receives until the socket is empty or `budget` bytes are through; returns whether the budget was what ended it. */
static int tcp_receive(nx_tcp_stream *stream, size_t budget) {
    struct iovec iov[TCP_IOV];
    while (stream->readable && budget) {
        if (stream->stage_at) {
            memmove(stream->stage, stream->stage + stream->stage_at, stream->stage_end - stream->stage_at);
            stream->stage_end -= stream->stage_at;
            stream->stage_at = 0;
        }
        int n = 0;
        size_t direct = 0, limit = budget < TCP_RECEIVE ? budget : TCP_RECEIVE;
        uint64_t left = 0;
        if (stream->phase == RX_PAYLOAD) {
            direct = tcp_gather(stream->rx_frame, iov, &n, TCP_IOV - 1, limit);
            left = stream->rx_frame->left;
        } else if (stream->phase == RX_TABLE) {
            left = direct = stream->rx_table_nbytes - stream->rx_table_done;
            iov[n++] = (struct iovec){stream->rx_table + stream->rx_table_done, direct};
        }
        int spread = stream->phase == RX_PAYLOAD && n >= TCP_SPREAD;
        if (spread && (stream->bounce || (stream->bounce = malloc(TCP_RECEIVE)))) {
            iov[0] = (struct iovec){stream->bounce, direct};
            n = 1;
        } else {
            spread = 0;
        }
        size_t wanted = direct;
        if (direct == left) {
            /* The next frame's beginning comes with this one's end. */
            iov[n++] = (struct iovec){stream->stage + stream->stage_end, TCP_STAGE - stream->stage_end};
            wanted += TCP_STAGE - stream->stage_end;
        }
        if (!stream->ours && tcp_is_stale(stream))
            return -ECONNRESET;
        ssize_t got = readv(stream->fd, iov, n);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN)
                return -errno;
            stream->readable = 0;
            return 0;
        }
        if (got == 0)
            return -ECONNRESET;
        stream->moved += (size_t)got;
        budget -= (size_t)got < budget ? (size_t)got : budget;
        size_t taken = (size_t)got < direct ? (size_t)got : direct;
        stream->stage_end += (size_t)got - taken;
        if (spread)
            tcp_spread(stream->rx_frame, stream->bounce, taken);
        else if (stream->phase == RX_PAYLOAD)
            tcp_advance(stream->rx_frame, taken);
        else if (stream->phase == RX_TABLE)
            stream->rx_table_done += taken;
        int result = tcp_parse(stream);
        if (result < 0)
            return result;
        /* A short read emptied the socket: epoll tells of what comes later. But an end that came earlier is told only once. */
        if ((size_t)got < wanted && !stream->ended) {
            stream->readable = 0;
            return 0;
        }
    }
    return stream->readable;
}
