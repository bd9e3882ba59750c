/* Lanes: threads that work on jobs without Python. A job is one list of segments; up to `ways` lanes work on it at once, each taking
   the next run when it is free. Jobs begin in the order they came in. Part of the unit file.c. */
typedef struct nx_job {
    struct nx_job *next;
    nx_work work;
    int64_t id;
    int32_t stop;
    int started, running;
    /* What is done instead of nx_work_on, with the arrays of `work`; `at` is where the next lane goes on. */
    void (*run)(struct nx_job *job);
    const int64_t *sources;
    nx_turn *turn;
    int64_t n_ranges, at;
    uint64_t *values;
    uint8_t *moved;
} nx_job;

static void nx_run_copy(nx_job *job) {
    const nx_work *work = &job->work;
    while (!nx_ended(&job->work)) {
        int64_t first = __atomic_load_n(&job->at, __ATOMIC_RELAXED), last;
        do {
            int64_t nbytes = 0;
            for (last = first; last < work->n && nbytes < NX_COPY_NBYTES; last++)
                nbytes += work->lengths[last];
        } while (!__atomic_compare_exchange_n(&job->at, &first, last, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        if (first == work->n)
            return;
        nx_copy_segments(work->addresses + first, job->sources + first, work->lengths + first, last - first, &job->stop);
    }
}

static void nx_run_summed(nx_job *job) {
    const nx_work *work = &job->work;
    nx_crc64nvme_move(job->turn, work->fds, work->offsets, work->addresses, work->lengths, work->n, job->n_ranges, job->values,
                      job->moved, &job->at, &job->stop);
    nx_ended(&job->work);
}

typedef struct {
    pthread_t thread;
    int waiting, narrowed;
    cpu_set_t cpus; /* Where it may run, while it is narrowed. */
} nx_lane_place;

struct nx_lanes {
    pthread_mutex_t lock; /* Of everything here but what is set when it is opened. */
    pthread_cond_t wake;
    nx_job *first, **end; /* Jobs that more lanes may begin. */
    nx_job *working;      /* Jobs in the hands of lanes and of nobody else. */
    nx_job *done;
    int event_fd, uring, idle, closing, n, n_places;
    unsigned depth;
    nx_lane_place *places; /* Of the lanes that run, in the order in which they began. */
    pthread_t threads[];
};

static void nx_unlink(nx_job **list, nx_job *job) {
    for (; *list; list = &(*list)->next)
        if (*list == job) {
            *list = job->next;
            return;
        }
}

/* Takes a job off the queue, if it is still there. */
static void nx_dequeue(nx_lanes *lanes, nx_job *job) {
    nx_unlink(&lanes->first, job);
    for (lanes->end = &lanes->first; *lanes->end;)
        lanes->end = &(*lanes->end)->next;
}

static void nx_job_done(nx_lanes *lanes, nx_job *job) {
    int told = lanes->done != NULL;
    job->next = lanes->done;
    lanes->done = job;
    uint64_t one = 1;
    /* It cannot be full: the reader takes all there are. */
    if (!told && write(lanes->event_fd, &one, sizeof one) < 0)
        return;
}

/* Lanes that are woken together are often put on one CPU, which looks idle for each of them, and there the second waits for the first.
   So the first keeps those that may come off its own CPU; the kernel moves the ones that stand there. The lock is held. */
static void nx_keep_off(nx_lanes *lanes, const nx_lane_place *own) {
    int cpu = sched_getcpu();
    for (int i = 0; cpu >= 0 && i < lanes->n_places; i++) {
        nx_lane_place *place = &lanes->places[i];
        if (place == own || !place->waiting || place->narrowed || pthread_getaffinity_np(place->thread, sizeof place->cpus, &place->cpus))
            continue;
        cpu_set_t others = place->cpus;
        CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others))
            place->narrowed = pthread_setaffinity_np(place->thread, sizeof others, &others) == 0;
    }
}

static void *nx_lane(void *argument) {
    nx_lanes *lanes = argument;
    int error;
    nx_ring *ring = lanes->uring ? nx_ring_open(lanes->depth, &error) : NULL;
    nx_slot *own = ring ? NULL : nx_new_slot();
    pthread_mutex_lock(&lanes->lock);
    nx_lane_place *place = &lanes->places[lanes->n_places++];
    place->thread = pthread_self();
    for (;;) {
        nx_job *job = lanes->first;
        if (!job) {
            if (lanes->closing)
                break;
            lanes->idle++;
            place->waiting = 1;
            pthread_cond_wait(&lanes->wake, &lanes->lock);
            place->waiting = 0;
            lanes->idle--;
            if (place->narrowed) {
                pthread_setaffinity_np(place->thread, sizeof place->cpus, &place->cpus);
                place->narrowed = 0;
            }
            continue;
        }
        job->running++;
        int queued = ++job->started < job->work.ways;
        if (!queued) {
            nx_dequeue(lanes, job);
            job->next = lanes->working;
            lanes->working = job;
        } else {
            nx_keep_off(lanes, place);
        }
        pthread_mutex_unlock(&lanes->lock);
        if (job->run)
            job->run(job);
        else if (ring || own)
            nx_work_on(&job->work, ring, own);
        else
            nx_fail(&job->work, -ENOMEM, 0);
        pthread_mutex_lock(&lanes->lock);
        /* Nothing of it is left to take, whoever may still be at work. */
        if (job->started < job->work.ways) {
            job->started = job->work.ways;
            nx_dequeue(lanes, job);
            job->next = lanes->working;
            lanes->working = job;
        }
        if (--job->running == 0) {
            nx_unlink(&lanes->working, job);
            nx_job_done(lanes, job);
        }
    }
    pthread_mutex_unlock(&lanes->lock);
    nx_ring_close(ring);
    nx_free_slot(own);
    return NULL;
}

static void nx_free_jobs(nx_job *job) {
    while (job) {
        nx_job *next = job->next;
        nx_work_end(&job->work);
        free(job);
        job = next;
    }
}

void nx_lanes_close(nx_lanes *lanes) {
    if (!lanes)
        return;
    pthread_mutex_lock(&lanes->lock);
    lanes->closing = 1;
    pthread_cond_broadcast(&lanes->wake);
    pthread_mutex_unlock(&lanes->lock);
    for (int i = 0; i < lanes->n; i++)
        pthread_join(lanes->threads[i], NULL);
    nx_free_jobs(lanes->done);
    pthread_cond_destroy(&lanes->wake);
    pthread_mutex_destroy(&lanes->lock);
    free(lanes->places);
    free(lanes);
}

nx_lanes *nx_lanes_open(int n, int uring, unsigned int depth, int event_fd) {
    nx_lanes *lanes = calloc(1, sizeof *lanes + (size_t)n * sizeof(pthread_t));
    if (!lanes)
        return NULL;
    lanes->places = calloc((size_t)n, sizeof *lanes->places);
    if (!lanes->places) {
        free(lanes);
        return NULL;
    }
    lanes->uring = uring;
    lanes->depth = depth;
    lanes->event_fd = event_fd;
    lanes->end = &lanes->first;
    pthread_mutex_init(&lanes->lock, NULL);
    pthread_cond_init(&lanes->wake, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (lanes->n < n && pthread_create(&lanes->threads[lanes->n], NULL, nx_lane, lanes) == 0) {
        pthread_setname_np(lanes->threads[lanes->n], "nixl-file");
        lanes->n++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!lanes->n) {
        nx_lanes_close(lanes);
        return NULL;
    }
    return lanes;
}

static void nx_enqueue(nx_lanes *lanes, nx_job *job, int64_t id, int ways) {
    job->id = id;
    job->work.ways = ways = ways < 1 ? 1 : ways > lanes->n ? lanes->n : ways;
    pthread_mutex_lock(&lanes->lock);
    *lanes->end = job;
    lanes->end = &job->next;
    int wake = lanes->idle < ways ? lanes->idle : ways;
    pthread_mutex_unlock(&lanes->lock);
    while (wake-- > 0)
        pthread_cond_signal(&lanes->wake);
}

int nx_lanes_submit(nx_lanes *lanes, int64_t id, int ways, int put, const int32_t *fds, const int32_t *direct_fds,
                    const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n, int64_t nbytes,
                    int64_t memory_align, int64_t offset_align) {
    nx_job *job = calloc(1, sizeof *job);
    if (!job)
        return -ENOMEM;
    nx_work_init(&job->work, put, fds, direct_fds, offsets, addresses, lengths, n, memory_align, offset_align, &job->stop);
    job->work.left = nbytes;
    nx_enqueue(lanes, job, id, ways);
    return 0;
}

int nx_lanes_submit_copy(nx_lanes *lanes, int64_t id, int ways, const int64_t *targets, const int64_t *sources,
                         const int64_t *lengths, int64_t n) {
    nx_job *job = calloc(1, sizeof *job);
    if (!job)
        return -ENOMEM;
    nx_work_init(&job->work, 0, NULL, NULL, NULL, targets, lengths, n, 1, 1, &job->stop);
    job->run = nx_run_copy;
    job->sources = sources;
    nx_enqueue(lanes, job, id, ways);
    return 0;
}

int nx_lanes_submit_summed(nx_lanes *lanes, int64_t id, int ways, nx_turn *turn, const int32_t *fds, const int64_t *offsets,
                           const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges,
                           uint64_t *values, uint8_t *moved) {
    nx_job *job = calloc(1, sizeof *job);
    if (!job)
        return -ENOMEM;
    nx_work_init(&job->work, turn != NULL, fds, fds, offsets, addresses, lengths, n_blocks, 1, 1, &job->stop);
    job->run = nx_run_summed;
    job->turn = turn;
    job->n_ranges = n_ranges;
    job->values = values;
    job->moved = moved;
    nx_enqueue(lanes, job, id, ways);
    return 0;
}

void nx_lanes_cancel(nx_lanes *lanes, int64_t id) {
    pthread_mutex_lock(&lanes->lock);
    for (nx_job *job = lanes->working; job; job = job->next)
        if (job->id == id)
            __atomic_store_n(&job->stop, 1, __ATOMIC_RELAXED);
    for (nx_job *job = lanes->first; job; job = job->next)
        if (job->id == id) {
            __atomic_store_n(&job->stop, 1, __ATOMIC_RELAXED);
            if (!job->started) {
                /* It does not wait for those before it. */
                nx_dequeue(lanes, job);
                nx_fail(&job->work, -ECANCELED, 0);
                nx_job_done(lanes, job);
            }
            break;
        }
    pthread_mutex_unlock(&lanes->lock);
}

int nx_lanes_done(nx_lanes *lanes, int64_t *ids, int64_t *errors, int64_t *failed, int max) {
    uint64_t count;
    if (read(lanes->event_fd, &count, sizeof count) < 0 && errno != EAGAIN)
        return 0;
    pthread_mutex_lock(&lanes->lock);
    int n = 0;
    nx_job *taken = lanes->done, *last = NULL;
    for (nx_job *job = taken; job && n < max; job = job->next, n++) {
        ids[n] = job->id;
        errors[n] = job->work.error;
        failed[n] = job->work.failed;
        last = job;
    }
    if (last) {
        lanes->done = last->next;
        last->next = NULL;
    }
    pthread_mutex_unlock(&lanes->lock);
    if (last)
        nx_free_jobs(taken);
    return n;
}
