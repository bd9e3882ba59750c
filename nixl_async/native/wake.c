/* Wake-ups: a foreign thread, such as a driver's, tells an event loop which of the points that it waits for has been reached.
 *
 * The driver calls `nx_signal_fire` with what `nx_signals_add` made. It takes no lock of Python's and calls nothing of the driver's:
 * a callback in Python would wait for the interpreter's lock, which a thread that waits for the driver may hold.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef struct nx_signals nx_signals;

struct nx_signals {
    pthread_mutex_t lock;
    int fd;
    int64_t refs; /* the loop's, and one of each signal that has not fired */
    uint64_t *fired;
    int64_t n, room;
};

typedef struct {
    nx_signals *signals;
    uint64_t token;
} signal_point;

nx_signals *nx_signals_open(void) {
    nx_signals *signals = calloc(1, sizeof *signals);
    if (!signals)
        return NULL;
    signals->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (signals->fd < 0) {
        free(signals);
        return NULL;
    }
    pthread_mutex_init(&signals->lock, NULL);
    signals->refs = 1;
    return signals;
}

int nx_signals_fd(nx_signals *signals) { return signals->fd; }

/* The lock is held, and is given up. */
static void signals_unref(nx_signals *signals) {
    int last = --signals->refs == 0;
    pthread_mutex_unlock(&signals->lock);
    if (!last)
        return;
    /* Only now: a signal that fires late must not write to a descriptor that is another's by then. */
    close(signals->fd);
    pthread_mutex_destroy(&signals->lock);
    free(signals->fired);
    free(signals);
}

/* Room for every signal is made here, so that firing one needs no memory. */
void *nx_signals_add(nx_signals *signals, uint64_t token) {
    signal_point *point = malloc(sizeof *point);
    if (!point)
        return NULL;
    point->signals = signals;
    point->token = token;
    pthread_mutex_lock(&signals->lock);
    int64_t needed = signals->n + signals->refs;
    if (needed > signals->room) {
        int64_t room = needed < 64 ? 64 : 2 * needed;
        uint64_t *grown = realloc(signals->fired, (size_t)room * sizeof *grown);
        if (!grown) {
            pthread_mutex_unlock(&signals->lock);
            free(point);
            return NULL;
        }
        signals->fired = grown;
        signals->room = room;
    }
    signals->refs++;
    pthread_mutex_unlock(&signals->lock);
    return point;
}

void nx_signal_fire(void *argument) {
    signal_point *point = argument;
    nx_signals *signals = point->signals;
    uint64_t one = 1;
    pthread_mutex_lock(&signals->lock);
    signals->fired[signals->n++] = point->token;
    while (write(signals->fd, &one, sizeof one) < 0 && errno == EINTR) {
    }
    signals_unref(signals);
    free(point);
}

void nx_signal_drop(void *argument) {
    signal_point *point = argument;
    pthread_mutex_lock(&point->signals->lock);
    signals_unref(point->signals);
    free(point);
}

/* Returns how many tokens it gave; as many as there was room for means: ask again. */
int64_t nx_signals_collect(nx_signals *signals, uint64_t *tokens, int64_t room) {
    uint64_t count;
    pthread_mutex_lock(&signals->lock);
    int64_t n = signals->n < room ? signals->n : room;
    for (int64_t i = 0; i < n; i++)
        tokens[i] = signals->fired[i];
    for (int64_t i = n; i < signals->n; i++)
        signals->fired[i - n] = signals->fired[i];
    signals->n -= n;
    if (signals->n == 0 && read(signals->fd, &count, sizeof count) < 0) {
        /* It was empty already. */
    }
    pthread_mutex_unlock(&signals->lock);
    return n;
}

void nx_signals_close(nx_signals *signals) {
    pthread_mutex_lock(&signals->lock);
    signals_unref(signals);
}

uintptr_t nx_signal_function(void) { return (uintptr_t)nx_signal_fire; }
