/* The drop-in's calls that callers repeat all the time (nixl_async.compat): making a transfer of prepared places, posting it, asking for
   its state. They are Python types, because each such call takes about a microsecond, of which a call through cffi would be a third.

   What is usual is done here; everything else, errors among it, is left to methods in Python of the same objects: _prepare, _make,
   _create, _post, _told (to send the notification of a transfer that is done), _status, _release. */
#include <Python.h>
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "polled.h"

/* Copies up to here keep the interpreter: handing it over costs as much as they do. */
#define NX_HELD_NBYTES (16 << 10)
/* What a thread copies itself, and what one does that runs an event loop: a twentieth of a millisecond's work. */
#define NX_AT_ONCE_NBYTES (16 << 20)
#define NX_ON_LOOP_NBYTES (512 << 10)
/* More segments than these take longer to pair than to hand the interpreter over. */
#define NX_HELD_SEGMENTS 4096

enum { NX_NEW, NX_ACTIVE, NX_DONE, NX_FAILED, NX_COPYING };

static PyTypeObject *nx_gate_type, *nx_target_type, *nx_side_type, *nx_ranges_type, *nx_request_type, *nx_calls_type;
/* What a list of descriptors has: rows that wait to be added, its kind of memory, and a view of the others; and this agent's name. */
static PyObject *nx_names[4];

static void nx_free(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int64_t nx_now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ll + at.tv_nsec;
}

/* A gate: whoever copies on its own thread goes in and out; whoever changes registrations closes it, and waits until all are out.
   `epoch` is another one after each change: what was found to hold before must be looked at again. */
typedef struct {
    PyObject_HEAD int32_t changing, copying;
    uint64_t epoch;
} nx_gate;

static void nx_gate_leave(nx_gate *gate) {
    if (__atomic_sub_fetch(&gate->copying, 1, __ATOMIC_SEQ_CST) == 0 && __atomic_load_n(&gate->changing, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &gate->copying, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int nx_gate_enter(nx_gate *gate) {
    __atomic_add_fetch(&gate->copying, 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&gate->changing, __ATOMIC_SEQ_CST))
        return 1;
    nx_gate_leave(gate);
    return 0;
}

static PyObject *gate_enter(PyObject *self, PyObject *nothing) {
    (void)nothing;
    return PyBool_FromLong(nx_gate_enter((nx_gate *)self));
}

static PyObject *gate_leave(PyObject *self, PyObject *nothing) {
    (void)nothing;
    nx_gate_leave((nx_gate *)self);
    Py_RETURN_NONE;
}

static PyObject *gate_bump(PyObject *self, PyObject *nothing) {
    (void)nothing;
    __atomic_add_fetch(&((nx_gate *)self)->epoch, 1, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyObject *gate_close(PyObject *self, PyObject *nothing) {
    nx_gate *gate = (nx_gate *)self;
    (void)nothing;
    __atomic_add_fetch(&gate->epoch, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&gate->changing, 1, __ATOMIC_SEQ_CST);
    Py_BEGIN_ALLOW_THREADS;
    for (int32_t n; (n = __atomic_load_n(&gate->copying, __ATOMIC_SEQ_CST)) != 0;)
        syscall(SYS_futex, &gate->copying, FUTEX_WAIT_PRIVATE, n, NULL, NULL, 0);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *gate_open(PyObject *self, PyObject *nothing) {
    (void)nothing;
    __atomic_sub_fetch(&((nx_gate *)self)->changing, 1, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyMethodDef gate_methods[] = {
    {"enter", gate_enter, METH_NOARGS, "Count one who copies; False while registrations change."},
    {"leave", gate_leave, METH_NOARGS, "Count one who copies less."},
    {"bump", gate_bump, METH_NOARGS, "Begin another epoch."},
    {"close", gate_close, METH_NOARGS, "Begin another epoch, let nobody in, and wait until nobody copies."},
    {"open", gate_open, METH_NOARGS, "Let them in again; once for each `close`."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef gate_members[] = {
    {"epoch", T_ULONGLONG, offsetof(nx_gate, epoch), READONLY, "How often something has changed."},
    {NULL, 0, 0, 0, NULL},
};

static void gate_free(PyObject *self) { nx_free(self); }

static PyType_Slot gate_slots[] = {
    {Py_tp_doc, "Keeps those who copy on their own threads apart from those who change registrations."},
    {Py_tp_methods, gate_methods},
    {Py_tp_members, gate_members},
    {Py_tp_dealloc, gate_free},
    {Py_tp_new, PyType_GenericNew},
    {0, NULL},
};

/* Where the bytes are: another process of this host, told apart from a later one of the same number by a descriptor of it that is ours,
   or (pid 0) this one. */
typedef struct {
    PyObject_HEAD int pid, pidfd;
} nx_target;

static PyObject *target_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    int pid, pidfd;
    (void)named;
    if (!PyArg_ParseTuple(arguments, "ii", &pid, &pidfd))
        return NULL;
    nx_target *target = (nx_target *)PyType_GenericAlloc(type, 0);
    if (!target)
        return NULL;
    target->pid = pid;
    target->pidfd = pid ? pidfd : -1;
    return (PyObject *)target;
}

static void target_free(PyObject *self) {
    if (((nx_target *)self)->pidfd >= 0)
        close(((nx_target *)self)->pidfd);
    nx_free(self);
}

static PyType_Slot target_slots[] = {
    {Py_tp_doc, "Target(pid, pidfd): the process whose memory is copied to or from, and its descriptor, which is closed at the end; "
                "pid 0 is this one."},
    {Py_tp_dealloc, target_free},
    {Py_tp_new, target_new},
    {0, NULL},
};

/* One side of transfers to be made: its places, found to be registered in `epoch`. Its columns are in `buffers`, or its own. */
typedef struct {
    PyObject_HEAD nx_places places;
    const int64_t *index;
    Py_buffer buffers[5];
    int n_buffers;
    int64_t *owned;
    uint64_t epoch;
    long long lane;
    PyObject *target, *way;
} nx_side;

static int nx_column(nx_side *side, PyObject *given, const int64_t **column) {
    if (given == Py_None)
        return 0;
    Py_buffer *buffer = &side->buffers[side->n_buffers];
    if (PyObject_GetBuffer(given, buffer, PyBUF_SIMPLE) < 0)
        return -1;
    side->n_buffers++;
    *column = buffer->buf;
    return 0;
}

static PyObject *side_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    PyObject *addresses, *lengths, *strides, *ends, *index, *target, *way;
    long long n, lane;
    unsigned long long epoch;
    (void)named;
    if (!PyArg_ParseTuple(arguments, "OOOOLOLKOO", &addresses, &lengths, &strides, &ends, &n, &index, &lane, &epoch, &target, &way))
        return NULL;
    if (target != Py_None && !PyObject_TypeCheck(target, nx_target_type)) {
        PyErr_SetString(PyExc_TypeError, "target must be a Target");
        return NULL;
    }
    nx_side *side = (nx_side *)PyType_GenericAlloc(type, 0);
    if (!side)
        return NULL;
    if (nx_column(side, addresses, &side->places.addresses) || nx_column(side, lengths, &side->places.lengths) ||
        nx_column(side, strides, &side->places.strides) || nx_column(side, ends, &side->places.ends) ||
        nx_column(side, index, &side->index)) {
        Py_DECREF((PyObject *)side);
        return NULL;
    }
    side->places.n = n;
    side->places.n_runs = side->buffers[1].len / (Py_ssize_t)sizeof(int64_t);
    int equal = n >= 0 && !side->places.strides == !side->places.ends && (side->places.ends || n == side->places.n_runs);
    for (int i = 0; i < side->n_buffers; i++)
        equal = equal && side->buffers[i].len == side->buffers[1].len;
    if (!equal) {
        PyErr_SetString(PyExc_ValueError, "columns of unequal length");
        Py_DECREF((PyObject *)side);
        return NULL;
    }
    side->lane = lane;
    side->epoch = epoch;
    if (target != Py_None)
        side->target = Py_NewRef(target);
    side->way = Py_NewRef(way);
    return (PyObject *)side;
}

static void side_free(PyObject *self) {
    nx_side *side = (nx_side *)self;
    while (side->n_buffers)
        PyBuffer_Release(&side->buffers[--side->n_buffers]);
    free(side->owned);
    Py_XDECREF(side->target);
    Py_XDECREF(side->way);
    nx_free(self);
}

static PyObject *side_columns(PyObject *self, PyObject *nothing) {
    const nx_places *places = &((nx_side *)self)->places;
    const int64_t *given[] = {places->addresses, places->lengths, places->strides, places->ends, ((nx_side *)self)->index};
    PyObject *columns = PyTuple_New(5);
    (void)nothing;
    for (int i = 0; columns && i < 5; i++) {
        Py_ssize_t nbytes = (Py_ssize_t)(places->n_runs * (int64_t)sizeof(int64_t));
        PyObject *one = given[i] ? PyBytes_FromStringAndSize((const char *)given[i], nbytes) : Py_NewRef(Py_None);
        if (!one || PyTuple_SetItem(columns, i, one) < 0)
            Py_CLEAR(columns);
    }
    return columns;
}

static PyMethodDef side_methods[] = {
    {"columns", side_columns, METH_NOARGS, "Return addresses, lengths, strides, ends and the regions' positions, as bytes or None."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef side_members[] = {
    {"way", T_OBJECT, offsetof(nx_side, way), READONLY, "What the caller gave."},
    {"target", T_OBJECT, offsetof(nx_side, target), READONLY, "The process that these places are of; None for this agent's own."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot side_slots[] = {
    {Py_tp_doc, "Side(addresses, lengths, strides, ends, n, index, lane, epoch, target, way): places to choose from."},
    {Py_tp_methods, side_methods},
    {Py_tp_members, side_members},
    {Py_tp_dealloc, side_free},
    {Py_tp_new, side_new},
    {0, NULL},
};

/* What of an agent's memory is registered, in `epoch`: sorted by their beginnings. */
typedef struct {
    PyObject_HEAD Py_buffer starts, ends;
    uint64_t epoch;
    long long lane;
    PyObject *target, *way;
} nx_ranges;

static PyObject *ranges_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    PyObject *starts, *ends, *target, *way;
    long long lane;
    unsigned long long epoch;
    (void)named;
    if (!PyArg_ParseTuple(arguments, "OOLKOO", &starts, &ends, &lane, &epoch, &target, &way))
        return NULL;
    if (target != Py_None && !PyObject_TypeCheck(target, nx_target_type)) {
        PyErr_SetString(PyExc_TypeError, "target must be a Target");
        return NULL;
    }
    nx_ranges *ranges = (nx_ranges *)PyType_GenericAlloc(type, 0);
    if (!ranges)
        return NULL;
    if (PyObject_GetBuffer(starts, &ranges->starts, PyBUF_SIMPLE) < 0 || PyObject_GetBuffer(ends, &ranges->ends, PyBUF_SIMPLE) < 0) {
        Py_DECREF((PyObject *)ranges);
        return NULL;
    }
    if (ranges->starts.len < (Py_ssize_t)sizeof(int64_t) || ranges->starts.len != ranges->ends.len) {
        PyErr_SetString(PyExc_ValueError, "give as many ends as starts, and one at least");
        Py_DECREF((PyObject *)ranges);
        return NULL;
    }
    ranges->lane = lane;
    ranges->epoch = epoch;
    ranges->target = target == Py_None ? NULL : Py_NewRef(target);
    ranges->way = Py_NewRef(way);
    return (PyObject *)ranges;
}

static void ranges_free(PyObject *self) {
    nx_ranges *ranges = (nx_ranges *)self;
    if (ranges->starts.obj)
        PyBuffer_Release(&ranges->starts);
    if (ranges->ends.obj)
        PyBuffer_Release(&ranges->ends);
    Py_XDECREF(ranges->target);
    Py_XDECREF(ranges->way);
    nx_free(self);
}

static PyMemberDef ranges_members[] = {
    {"epoch", T_ULONGLONG, offsetof(nx_ranges, epoch), READONLY, "When that held."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot ranges_slots[] = {
    {Py_tp_members, ranges_members},
    {Py_tp_doc, "Ranges(starts, ends, lane, epoch, target, way): what is registered, sorted by its beginnings."},
    {Py_tp_dealloc, ranges_free},
    {Py_tp_new, ranges_new},
    {0, NULL},
};

/* Return the position of a range that holds a place, -1 if there is none; `guess` is one to look at first. */
static int64_t nx_holder(const nx_ranges *ranges, int64_t address, int64_t span, int64_t guess) {
    const int64_t *starts = ranges->starts.buf, *ends = ranges->ends.buf;
    int64_t low = 0, high = ranges->starts.len / (Py_ssize_t)sizeof(int64_t);
    if (guess < high && starts[guess] <= address && ends[guess] >= address && span <= ends[guess] - address)
        return guess;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (starts[middle] <= address)
            low = middle + 1;
        else
            high = middle;
    }
    /* A range that begins later may end sooner, where registrations overlap. */
    for (low--; low >= 0 && !(ends[low] >= address && span <= ends[low] - address); low--)
        ;
    return low;
}

/* Make a side of n rows of (address, length, device), or of (address, length, device, stride, count) with `width` 5; NULL without an
   exception where Python is to say what is wrong. */
static nx_side *nx_located(const nx_ranges *ranges, const int64_t *rows, int64_t n, int width) {
    int indexed = ranges->starts.len > (Py_ssize_t)sizeof(int64_t);
    int64_t *owned = malloc((size_t)(n * (width == 5 ? 5 : 3)) * sizeof(int64_t));
    if (!owned)
        return NULL;
    int64_t *addresses = owned, *lengths = owned + n, *index = owned + 2 * n, *strides = owned + 3 * n, *ends = owned + 4 * n;
    int64_t total = 0, at = 0, done = 0;
    if (width == 3 && !indexed) {
        uint64_t start = (uint64_t) * (const int64_t *)ranges->starts.buf, room = (uint64_t) * (const int64_t *)ranges->ends.buf - start;
        uint64_t wrong = 0;
        for (; done < n; done++) {
            const int64_t *row = rows + done * 3;
            uint64_t address = (uint64_t)row[0] - start, length = (uint64_t)row[1];
            wrong |= (address > room) | (length > room - address) | ((uint64_t)row[2] >> 63);
            addresses[done] = row[0];
            lengths[done] = row[1];
        }
        if (wrong) {
            free(owned);
            return NULL;
        }
    }
    for (int64_t i = done; i < n; i++) {
        const int64_t *row = rows + i * width;
        int64_t address = row[0], length = row[1], span = length;
        /* More than any registration has is negative. */
        int good = address >= 0 && length >= 0 && row[2] >= 0;
        if (good && width == 5) {
            int64_t stride = row[3], count = row[4];
            good = count > 0 && stride >= length && (!stride || count - 1 <= (INT64_MAX - length) / stride) && total <= INT64_MAX - count;
            if (good) {
                span = (count - 1) * stride + length;
                total += count;
                strides[i] = stride;
                ends[i] = total;
            }
        }
        at = good ? nx_holder(ranges, address, span, at) : -1;
        if (at < 0) {
            free(owned);
            return NULL;
        }
        addresses[i] = address;
        lengths[i] = length;
        index[i] = at;
    }
    nx_side *side = (nx_side *)PyType_GenericAlloc(nx_side_type, 0);
    if (!side) {
        free(owned);
        return NULL;
    }
    side->owned = owned;
    side->places.addresses = addresses;
    side->places.lengths = lengths;
    side->places.strides = width == 5 ? strides : NULL;
    side->places.ends = width == 5 ? ends : NULL;
    side->places.n_runs = n;
    side->places.n = width == 5 ? total : n;
    side->index = indexed ? index : NULL;
    side->epoch = ranges->epoch;
    side->lane = ranges->lane;
    side->target = ranges->target ? Py_NewRef(ranges->target) : NULL;
    side->way = Py_NewRef(ranges->way);
    return side;
}

/* A transfer. `block` has the segments as nx_pair writes them, `stride` apart; armed, it can be posted here in that epoch. */
typedef struct {
    PyObject_HEAD nx_gate *gate;
    nx_target *target;
    int64_t *block, stride, count, nbytes, n_descs, began_ns, ended_ns;
    uint64_t epoch;
    int state, put, armed;
    PyObject *notify, *near, *far;
} nx_request;

static void request_free(PyObject *self) {
    nx_request *request = (nx_request *)self;
    free(request->block);
    Py_XDECREF((PyObject *)request->gate);
    Py_XDECREF((PyObject *)request->target);
    Py_XDECREF(request->notify);
    Py_XDECREF(request->near);
    Py_XDECREF(request->far);
    nx_free(self);
}

static PyObject *request_arm(PyObject *self, PyObject *arguments) {
    nx_request *request = (nx_request *)self;
    PyObject *gate, *target, *given[3];
    unsigned long long epoch;
    if (!PyArg_ParseTuple(arguments, "O!O!KOOO", nx_gate_type, &gate, nx_target_type, &target, &epoch, &given[0], &given[1], &given[2]))
        return NULL;
    if (!request->block) {
        int64_t *block = NULL;
        Py_ssize_t n = 0;
        for (int i = 0; i < 3; i++) {
            Py_buffer buffer;
            if (PyObject_GetBuffer(given[i], &buffer, PyBUF_SIMPLE) < 0) {
                free(block);
                return NULL;
            }
            if (i == 0) {
                n = buffer.len / (Py_ssize_t)sizeof(int64_t);
                block = malloc((size_t)(5 * n + 1) * sizeof(int64_t));
            }
            if (block && buffer.len == n * (Py_ssize_t)sizeof(int64_t))
                memcpy(block + i * n, buffer.buf, (size_t)buffer.len);
            else if (block)
                i = 3;
            PyBuffer_Release(&buffer);
            if (!block)
                return PyErr_NoMemory();
            if (i == 3) {
                free(block);
                PyErr_SetString(PyExc_ValueError, "columns of unequal length");
                return NULL;
            }
        }
        request->block = block;
        request->stride = request->count = n;
    }
    PyObject *old_gate = (PyObject *)request->gate, *old_target = (PyObject *)request->target;
    request->gate = (nx_gate *)Py_NewRef(gate);
    request->target = (nx_target *)Py_NewRef(target);
    Py_XDECREF(old_gate);
    Py_XDECREF(old_target);
    request->epoch = epoch;
    request->armed = 1;
    Py_RETURN_NONE;
}

static PyObject *request_columns(PyObject *self, PyObject *nothing) {
    nx_request *request = (nx_request *)self;
    PyObject *columns = PyTuple_New(5);
    (void)nothing;
    for (int i = 0; columns && i < 5; i++) {
        const char *column = request->block ? (const char *)(request->block + i * request->stride) : "";
        PyObject *bytes = PyBytes_FromStringAndSize(column, (Py_ssize_t)(request->count * (int64_t)sizeof(int64_t)));
        if (!bytes || PyTuple_SetItem(columns, i, bytes) < 0)
            Py_CLEAR(columns);
    }
    return columns;
}

static PyMethodDef request_methods[] = {
    {"arm", request_arm, METH_VARARGS, "arm(gate, target, epoch, here, there, lengths): let it be posted natively from now on."},
    {"columns", request_columns, METH_NOARGS, "Return addresses here and there, lengths, regions here and there, as bytes."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef request_members[] = {
    {"state", T_INT, offsetof(nx_request, state), 0, "0 new, 1 active, 2 done, 3 failed, 4 being copied by a caller's thread."},
    {"put", T_INT, offsetof(nx_request, put), 0, "Whether it writes to the far side."},
    {"nbytes", T_LONGLONG, offsetof(nx_request, nbytes), 0, "The bytes that it moves."},
    {"n_descs", T_LONGLONG, offsetof(nx_request, n_descs), 0, "The descriptors that it has."},
    {"began_ns", T_LONGLONG, offsetof(nx_request, began_ns), 0, "When it was posted last, by the monotonic clock."},
    {"ended_ns", T_LONGLONG, offsetof(nx_request, ended_ns), 0, "When it ended."},
    {"notify", T_OBJECT, offsetof(nx_request, notify), 0, "The notification that follows it; None without."},
    {"near", T_OBJECT, offsetof(nx_request, near), READONLY, "The Side that it was made of here; None if it was not."},
    {"far", T_OBJECT, offsetof(nx_request, far), READONLY, "The same of the far side."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot request_slots[] = {
    {Py_tp_doc, "A transfer, as far as it is posted natively."},
    {Py_tp_methods, request_methods},
    {Py_tp_members, request_members},
    {Py_tp_dealloc, request_free},
    {Py_tp_new, PyType_GenericNew},
    {0, NULL},
};

/* Returns 1 if the bytes are moved. */
static int nx_copied(const nx_request *request) {
    const int64_t *here = request->block, *there = here + request->stride, *lengths = there + request->stride;
    const nx_target *target = request->target;
    if (!nx_gate_enter(request->gate))
        return 0;
    int good = __atomic_load_n(&request->gate->epoch, __ATOMIC_SEQ_CST) == request->epoch;
    if (good && target->pid) {
        /* Once the process has ended, its number may come to mean another one. */
        struct pollfd alive = {target->pidfd, POLLIN, 0};
        good = poll(&alive, 1, 0) == 0 && !nx_copy_between(target->pid, request->put, here, there, lengths, request->count, NULL);
    } else if (good) {
        nx_copy_segments(request->put ? there : here, request->put ? here : there, lengths, request->count, NULL);
    }
    nx_gate_leave(request->gate);
    return good;
}

/* What an agent's low layer is made of; `requests` and `sides` are dictionaries by handle, `ranges` by the name of the agent, or "". */
typedef struct {
    PyObject_HEAD PyObject *requests, *sides, *ranges, *kind, *list_kind, *memory, *success, *in_progress, *write, *running_loop;
    nx_gate *gate;
    uint64_t next;
    int timed;
} nx_calls;

static PyObject *calls_open(PyObject *self, PyObject *arguments) {
    nx_calls *calls = (nx_calls *)self;
    PyObject *requests, *sides, *ranges, *gate, *kind, *list_kind, *memory, *success, *in_progress, *write, *running_loop;
    int timed;
    if (calls->requests) {
        PyErr_SetString(PyExc_RuntimeError, "it is open");
        return NULL;
    }
    if (!PyArg_ParseTuple(arguments, "O!O!O!O!O!OOOOOOi", &PyDict_Type, &requests, &PyDict_Type, &sides, &PyDict_Type, &ranges,
                          nx_gate_type, &gate, &PyType_Type, &kind, &list_kind, &memory, &success, &in_progress, &write, &running_loop,
                          &timed))
        return NULL;
    if (!PyType_IsSubtype((PyTypeObject *)kind, nx_request_type)) {
        PyErr_SetString(PyExc_TypeError, "requests must be of a subclass of Request");
        return NULL;
    }
    calls->requests = Py_NewRef(requests);
    calls->sides = Py_NewRef(sides);
    calls->ranges = Py_NewRef(ranges);
    calls->list_kind = Py_NewRef(list_kind);
    calls->memory = Py_NewRef(memory);
    calls->gate = (nx_gate *)Py_NewRef(gate);
    calls->kind = Py_NewRef(kind);
    calls->success = Py_NewRef(success);
    calls->in_progress = Py_NewRef(in_progress);
    calls->write = Py_NewRef(write);
    calls->running_loop = Py_NewRef(running_loop);
    calls->next = 1ull << 40;
    calls->timed = timed;
    Py_RETURN_NONE;
}

static void calls_free(PyObject *self) {
    nx_calls *calls = (nx_calls *)self;
    PyObject **held[] = {&calls->requests, &calls->sides,   &calls->ranges,      &calls->kind,  &calls->list_kind,
                         &calls->memory,   &calls->success, &calls->in_progress, &calls->write, &calls->running_loop};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++)
        Py_CLEAR(*held[i]);
    Py_XDECREF((PyObject *)calls->gate);
    nx_free(self);
}

/* Leave a call to the method in Python. */
static PyObject *nx_slowly(PyObject *self, const char *name, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    PyObject *method = PyObject_GetAttrString(self, name), *found = NULL;
    PyObject *positional = method ? PyTuple_New(n) : NULL, *named = names ? PyDict_New() : NULL;
    if (positional && (named || !names)) {
        for (Py_ssize_t i = 0; i < n; i++)
            PyTuple_SetItem(positional, i, Py_NewRef(arguments[i]));
        int good = 1;
        for (Py_ssize_t i = 0; names && good && i < PyTuple_Size(names); i++)
            good = PyDict_SetItem(named, PyTuple_GetItem(names, i), arguments[n + i]) == 0;
        if (good)
            found = PyObject_Call(method, positional, named);
    }
    Py_XDECREF(method);
    Py_XDECREF(positional);
    Py_XDECREF(named);
    return found;
}

/* Return the request with this handle, borrowed, or NULL without an exception. */
static nx_request *nx_request_of(nx_calls *calls, PyObject *handle) {
    PyObject *found = calls->requests && PyLong_CheckExact(handle) ? PyDict_GetItemWithError(calls->requests, handle) : NULL;
    if (!found)
        PyErr_Clear();
    return (nx_request *)found;
}

static int nx_empty(PyObject *text) { return PyBytes_CheckExact(text) && PyBytes_Size(text) == 0; }

/* Whether the caller's thread is to copy so much: a thread that runs an event loop has other things to do. */
static int nx_may_copy(nx_calls *calls, int64_t nbytes) {
    if (nbytes <= NX_ON_LOOP_NBYTES)
        return 1;
    if (nbytes > NX_AT_ONCE_NBYTES)
        return 0;
    PyObject *loop = PyObject_CallNoArgs(calls->running_loop);
    int none = loop == Py_None;
    Py_XDECREF(loop);
    PyErr_Clear();
    return none;
}

static PyObject *calls_post(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    nx_calls *calls = (nx_calls *)self;
    nx_request *request = !names && (n == 1 || n == 2) ? nx_request_of(calls, arguments[0]) : NULL;
    /* It may be released by another thread meanwhile. */
    Py_XINCREF((PyObject *)request);
    if (request && request->armed && request->state != NX_ACTIVE && request->state != NX_COPYING &&
        nx_may_copy(calls, request->nbytes)) {
        int before = request->state, copied, told = (n == 2 && !nx_empty(arguments[1])) || (request->notify && request->notify != Py_None);
        if (calls->timed)
            request->began_ns = nx_now();
        request->state = NX_COPYING;
        if (request->nbytes <= NX_HELD_NBYTES) {
            copied = nx_copied(request);
        } else {
            Py_BEGIN_ALLOW_THREADS;
            copied = nx_copied(request);
            Py_END_ALLOW_THREADS;
        }
        if (calls->timed)
            request->ended_ns = nx_now();
        request->state = copied ? NX_DONE : before;
        if (copied) {
            Py_DECREF((PyObject *)request);
            return told ? nx_slowly(self, "_told", arguments, n, names) : Py_NewRef(calls->success);
        }
    }
    Py_XDECREF((PyObject *)request);
    return nx_slowly(self, "_post", arguments, n, names);
}

static PyObject *calls_status(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    nx_calls *calls = (nx_calls *)self;
    nx_request *request = !names && n == 1 ? nx_request_of(calls, arguments[0]) : NULL;
    if (request && request->state == NX_DONE)
        return Py_NewRef(calls->success);
    if (request && request->state == NX_COPYING)
        return Py_NewRef(calls->in_progress);
    return nx_slowly(self, "_status", arguments, n, names);
}

static PyObject *calls_release(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    nx_calls *calls = (nx_calls *)self;
    nx_request *request = !names && n == 1 ? nx_request_of(calls, arguments[0]) : NULL;
    if (request && request->state != NX_ACTIVE && request->state != NX_COPYING) {
        if (PyDict_DelItem(calls->requests, arguments[0]) < 0)
            return NULL;
        return Py_NewRef(calls->success);
    }
    return nx_slowly(self, "_release", arguments, n, names);
}

/* Indices as nx_pair takes them, from a list or an array of int32 or int64. */
typedef struct {
    Py_buffer buffer;
    int64_t *made;
    const void *chosen;
    int width;
    Py_ssize_t n;
} nx_indices;

static int nx_read_indices(PyObject *given, nx_indices *indices) {
    memset(indices, 0, sizeof *indices);
    if (PyList_CheckExact(given)) {
        indices->n = PyList_Size(given);
        indices->width = 8;
        if (!indices->n || !(indices->made = malloc((size_t)indices->n * sizeof(int64_t))))
            return 0;
        for (Py_ssize_t i = 0; i < indices->n; i++) {
            PyObject *one = PyList_GetItem(given, i);
            if (!one || !PyLong_CheckExact(one))
                return 0;
            indices->made[i] = PyLong_AsLongLong(one);
            if (indices->made[i] == -1 && PyErr_Occurred())
                return 0;
        }
        indices->chosen = indices->made;
        return 1;
    }
    if (!PyObject_CheckBuffer(given) || PyBytes_Check(given) ||
        PyObject_GetBuffer(given, &indices->buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return 0;
    const char *format = indices->buffer.format;
    indices->width = (int)indices->buffer.itemsize;
    if (indices->buffer.ndim != 1 || !format || format[1] ||
        !((indices->width == 8 && strchr("lq", format[0])) || (indices->width == 4 && strchr("il", format[0]))))
        return 0;
    indices->n = indices->buffer.shape[0];
    indices->chosen = indices->buffer.buf;
    return indices->n > 0;
}

static void nx_free_indices(nx_indices *indices) {
    free(indices->made);
    if (indices->buffer.obj)
        PyBuffer_Release(&indices->buffer);
}

static int nx_no_backends(PyObject *given) {
    return (PyList_CheckExact(given) && !PyList_Size(given)) || (PyTuple_CheckExact(given) && !PyTuple_Size(given));
}

static nx_side *nx_side_of(nx_calls *calls, PyObject *handle) {
    PyObject *found = PyLong_CheckExact(handle) ? PyDict_GetItemWithError(calls->sides, handle) : NULL;
    if (!found)
        PyErr_Clear();
    return (nx_side *)found;
}

/* Make a transfer of two sides; return its handle, or NULL, without an exception where Python is to say what is wrong. */
static PyObject *nx_make(nx_calls *calls, PyObject *operation, nx_side *near, const nx_indices *mine, nx_side *far,
                         const nx_indices *theirs, PyObject *notify, int merge) {
    Py_ssize_t n = mine->n;
    int64_t count, *block = malloc((size_t)(5 * n + 1) * sizeof(int64_t));
    if (!block)
        return PyErr_NoMemory();
    if (n > NX_HELD_SEGMENTS) {
        Py_BEGIN_ALLOW_THREADS;
        count = nx_pair(&near->places, mine->chosen, near->index, &far->places, theirs->chosen, far->index, mine->width, theirs->width,
                        n, block);
        Py_END_ALLOW_THREADS;
    } else {
        count = nx_pair(&near->places, mine->chosen, near->index, &far->places, theirs->chosen, far->index, mine->width, theirs->width,
                        n, block);
    }
    nx_request *request = count < 0 ? NULL : (nx_request *)PyType_GenericAlloc((PyTypeObject *)calls->kind, 0);
    if (!request) {
        free(block);
        return NULL;
    }
    request->block = block;
    request->stride = n;
    request->count = count;
    request->nbytes = block[5 * n];
    request->n_descs = merge ? count : n;
    request->put = operation == calls->write;
    request->near = Py_NewRef((PyObject *)near);
    request->far = Py_NewRef((PyObject *)far);
    request->gate = (nx_gate *)Py_NewRef((PyObject *)calls->gate);
    if (!nx_empty(notify))
        request->notify = Py_NewRef(notify);
    if (far->target && count && count <= 1024) {
        request->target = (nx_target *)Py_NewRef(far->target);
        request->epoch = far->epoch;
        request->armed = 1;
    }
    calls->next += 16;
    PyObject *handle = PyLong_FromUnsignedLongLong(calls->next);
    if (handle && PyDict_SetItem(calls->requests, handle, (PyObject *)request) < 0)
        Py_CLEAR(handle);
    Py_DECREF((PyObject *)request);
    return handle;
}

static PyObject *calls_make(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    nx_calls *calls = (nx_calls *)self;
    if (!names && n == 8 && calls->sides && PyBytes_CheckExact(arguments[5]) && nx_no_backends(arguments[6]) &&
        PyBool_Check(arguments[7])) {
        nx_side *near = nx_side_of(calls, arguments[1]), *far = nx_side_of(calls, arguments[3]);
        uint64_t epoch = __atomic_load_n(&calls->gate->epoch, __ATOMIC_SEQ_CST);
        if (near && far && near->lane == far->lane && !near->target && far->target && near->epoch == epoch && far->epoch == epoch) {
            nx_indices mine, theirs;
            PyObject *made = NULL;
            Py_INCREF((PyObject *)near);
            Py_INCREF((PyObject *)far);
            int good = nx_read_indices(arguments[2], &mine);
            good = nx_read_indices(arguments[4], &theirs) && good;
            if (good && mine.n == theirs.n)
                made = nx_make(calls, arguments[0], near, &mine, far, &theirs, arguments[5], arguments[7] != Py_True);
            nx_free_indices(&mine);
            nx_free_indices(&theirs);
            Py_DECREF((PyObject *)near);
            Py_DECREF((PyObject *)far);
            if (made)
                return made;
            PyErr_Clear();
        }
    }
    return nx_slowly(self, "_make", arguments, n, names);
}

/* Return the rows of a list of descriptors, or of an array of runs, in `buffer`: 0 if they are not as usual. */
static int nx_rows(nx_calls *calls, PyObject *given, int width, Py_buffer *buffer) {
    PyObject *array;
    if (width == 5) {
        array = Py_NewRef(given);
    } else {
        if ((PyObject *)Py_TYPE(given) != calls->list_kind)
            return 0;
        PyObject *more = PyObject_GetAttr(given, nx_names[0]), *memory = PyObject_GetAttr(given, nx_names[1]);
        array = more && PyList_CheckExact(more) && !PyList_Size(more) && memory == calls->memory
                    ? PyObject_GetAttr(given, nx_names[2])
                    : NULL;
        Py_XDECREF(more);
        Py_XDECREF(memory);
    }
    if (!array || array == Py_None || PyBytes_Check(array) || !PyObject_CheckBuffer(array) ||
        PyObject_GetBuffer(array, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        Py_XDECREF(array);
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(array);
    const char *format = buffer->format;
    if (buffer->ndim == 2 && buffer->shape[1] == width && buffer->shape[0] > 0 && buffer->itemsize == 8 && format &&
        strchr("lLqQ", format[0]) && !format[1])
        return 1;
    PyBuffer_Release(buffer);
    return 0;
}

/* Return what is registered of an agent, by its name, as far as that is known in this epoch; borrowed, NULL without an exception. */
static nx_ranges *nx_ranges_of(nx_calls *calls, PyObject *name) {
    PyObject *found = calls->ranges && PyUnicode_CheckExact(name) ? PyDict_GetItemWithError(calls->ranges, name) : NULL;
    if (!found)
        PyErr_Clear();
    else if (((nx_ranges *)found)->epoch != __atomic_load_n(&calls->gate->epoch, __ATOMIC_SEQ_CST))
        found = NULL;
    return (nx_ranges *)found;
}

static PyObject *calls_prepare(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    nx_calls *calls = (nx_calls *)self;
    if (!names && (n == 3 || n == 4) && calls->ranges && PyUnicode_CheckExact(arguments[0]) && nx_no_backends(arguments[n - 1])) {
        nx_ranges *ranges = nx_ranges_of(calls, arguments[0]);
        Py_buffer rows;
        Py_XINCREF((PyObject *)ranges);
        if (ranges && (n == 3 || arguments[1] == calls->memory) && nx_rows(calls, arguments[n - 2], n == 4 ? 5 : 3, &rows)) {
            nx_side *side = nx_located(ranges, rows.buf, rows.shape[0], n == 4 ? 5 : 3);
            PyBuffer_Release(&rows);
            calls->next += 16;
            PyObject *handle = side ? PyLong_FromUnsignedLongLong(calls->next) : NULL;
            if (handle && PyDict_SetItem(calls->sides, handle, (PyObject *)side) < 0)
                Py_CLEAR(handle);
            Py_XDECREF((PyObject *)side);
            if (handle) {
                Py_DECREF((PyObject *)ranges);
                return handle;
            }
        }
        Py_XDECREF((PyObject *)ranges);
        PyErr_Clear();
    }
    return nx_slowly(self, "_prepare", arguments, n, names);
}

static nx_side *nx_side_in(nx_calls *calls, PyObject *name, PyObject *list) {
    nx_ranges *ranges = nx_ranges_of(calls, name);
    Py_buffer rows;
    nx_side *side = NULL;
    Py_XINCREF((PyObject *)ranges);
    if (ranges && nx_rows(calls, list, 3, &rows)) {
        side = nx_located(ranges, rows.buf, rows.shape[0], 3);
        PyBuffer_Release(&rows);
    }
    Py_XDECREF((PyObject *)ranges);
    return side;
}

static PyObject *calls_create(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names) {
    nx_calls *calls = (nx_calls *)self;
    if (!names && n == 6 && calls->ranges && PyBytes_CheckExact(arguments[4]) && nx_no_backends(arguments[5])) {
        nx_side *near = nx_side_in(calls, nx_names[3], arguments[1]), *far = near ? nx_side_in(calls, arguments[3], arguments[2]) : NULL;
        PyObject *made = NULL;
        if (far && far->target && !near->target && near->lane == far->lane && near->places.n == far->places.n) {
            nx_indices all = {.n = (Py_ssize_t)near->places.n};
            made = nx_make(calls, arguments[0], near, &all, far, &all, arguments[4], 0);
        }
        Py_XDECREF((PyObject *)near);
        Py_XDECREF((PyObject *)far);
        if (made)
            return made;
        PyErr_Clear();
    }
    return nx_slowly(self, "_create", arguments, n, names);
}

static PyMethodDef calls_methods[] = {
    {"open_calls", calls_open, METH_VARARGS,
     "open_calls(requests, sides, ranges, gate, kind, list_kind, memory, success, in_progress, write, running_loop, timed): say what "
     "the calls go by."},
    {"prepXferDlist", (PyCFunction)(void (*)(void))calls_prepare, METH_FASTCALL | METH_KEYWORDS,
     "prepXferDlist(agent_name, descs, backends=()), or (agent_name, memory, array, backends), or (descs, backends): prepare places to "
     "choose from."},
    {"postXferReq", (PyCFunction)(void (*)(void))calls_post, METH_FASTCALL | METH_KEYWORDS,
     "postXferReq(reqh, notif_msg=b\"\"): start a transfer; it may be done when this returns."},
    {"getXferStatus", (PyCFunction)(void (*)(void))calls_status, METH_FASTCALL | METH_KEYWORDS,
     "getXferStatus(reqh): return whether a transfer is done; raise what it failed with."},
    {"releaseXferReq", (PyCFunction)(void (*)(void))calls_release, METH_FASTCALL | METH_KEYWORDS,
     "releaseXferReq(reqh): forget a transfer; one that is under way is cancelled first, and no byte of it moves afterwards."},
    {"makeXferReq", (PyCFunction)(void (*)(void))calls_make, METH_FASTCALL | METH_KEYWORDS,
     "makeXferReq(operation, local_side, local_indices, remote_side, remote_indices, notif_msg=b\"\", backend=(), "
     "skip_desc_merg=False): make a transfer of chosen places."},
    {"createXferReq", (PyCFunction)(void (*)(void))calls_create, METH_FASTCALL | METH_KEYWORDS,
     "createXferReq(operation, local_descs, remote_descs, remote_agent, notif_msg=b\"\", backend=()): make a transfer of two lists."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot calls_slots[] = {
    {Py_tp_doc, "The calls of an agent's low layer that are repeated; what is unusual goes to _prepare, _make, _create, _post, _told, _status "
                "and _release."},
    {Py_tp_methods, calls_methods},
    {Py_tp_dealloc, calls_free},
    {Py_tp_new, PyType_GenericNew},
    {0, NULL},
};

static PyTypeObject *nx_type(const char *name, size_t nbytes, PyType_Slot *slots, unsigned int flags) {
    PyType_Spec spec = {name, (int)nbytes, 0, (unsigned int)Py_TPFLAGS_DEFAULT | flags, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* Return a tuple of the types, for whoever calls first: Gate, Target, Side, Ranges, Request, Calls; NULL if there is no memory for them. */
void *nx_polled(void) {
    PyGILState_STATE held = PyGILState_Ensure();
    PyObject *types = NULL;
    if (!nx_calls_type) {
        nx_gate_type = nx_type("nixl_async.native.Gate", sizeof(nx_gate), gate_slots, 0);
        nx_target_type = nx_type("nixl_async.native.Target", sizeof(nx_target), target_slots, 0);
        nx_side_type = nx_type("nixl_async.native.Side", sizeof(nx_side), side_slots, 0);
        nx_ranges_type = nx_type("nixl_async.native.Ranges", sizeof(nx_ranges), ranges_slots, 0);
        nx_request_type = nx_type("nixl_async.native.Request", sizeof(nx_request), request_slots, Py_TPFLAGS_BASETYPE);
        nx_names[0] = PyUnicode_InternFromString("_more");
        nx_names[1] = PyUnicode_InternFromString("_type");
        nx_names[2] = PyUnicode_InternFromString("_view");
        nx_names[3] = PyUnicode_InternFromString("");
        if (nx_names[0] && nx_names[1] && nx_names[2] && nx_names[3])
            nx_calls_type = nx_type("nixl_async.native.Calls", sizeof(nx_calls), calls_slots, Py_TPFLAGS_BASETYPE);
    }
    if (nx_gate_type && nx_target_type && nx_side_type && nx_ranges_type && nx_request_type && nx_calls_type)
        types = PyTuple_Pack(6, nx_gate_type, nx_target_type, nx_side_type, nx_ranges_type, nx_request_type, nx_calls_type);
    PyErr_Clear();
    PyGILState_Release(held);
    return types;
}
