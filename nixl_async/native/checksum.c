/* CRC-64/NVME (NVM Express NVM Command Set Specification 1.0, 5.2.1.3.4): polynomial 0xAD93D23594C93659, bits reflected, begun with
   and inverted by ones. With carry-less multiplication where the processor has it, else by tables, eight bytes at a time. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "checksum.h"

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif
/* Pieces and the file's pages share the second-level cache. Those that are written are larger: threads take turns at that. */
#define NX_CRC_GET (256 << 10)
#define NX_CRC_PUT (1 << 20)
#define NX_CRC_IOV 64
#define NX_CRC_POLYNOMIAL UINT64_C(0x9a6c9329ac4bc9b5)

static uint64_t nx_crc_table[8][256];
static pthread_once_t nx_crc_once = PTHREAD_ONCE_INIT;

static void nx_crc_fill(void) {
    for (int i = 0; i < 256; i++) {
        uint64_t value = (uint64_t)i;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? NX_CRC_POLYNOMIAL : 0);
        nx_crc_table[0][i] = value;
    }
    for (int i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++)
            nx_crc_table[t][i] = nx_crc_table[t - 1][i] >> 8 ^ nx_crc_table[0][nx_crc_table[t - 1][i] & 0xff];
}

static uint64_t nx_crc_plain(const unsigned char *data, int64_t n, uint64_t crc) {
    for (; n >= 8; data += 8, n -= 8) {
        for (int i = 0; i < 8; i++)
            crc ^= (uint64_t)data[i] << 8 * i;
        uint64_t next = 0;
        for (int i = 0; i < 8; i++)
            next ^= nx_crc_table[7 - i][crc >> 8 * i & 0xff];
        crc = next;
    }
    for (; n > 0; data++, n--)
        crc = crc >> 8 ^ nx_crc_table[0][(crc ^ *data) & 0xff];
    return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define NX_CRC_TARGET __attribute__((target("pclmul,sse2")))
#define NX_CRC_LANES 8
#define NX_CRC_AHEAD 2048 /* Processors fetch ahead by themselves up to the end of a page only. */

/* Moves 128 bits of a message forward: the reflected x^(distance + 63) mod P for the half that comes first, x^(distance - 1) for
   the other. Products of reflected numbers are one bit short, hence the odd exponents. */
NX_CRC_TARGET static inline __m128i nx_crc_fold(__m128i value, __m128i by, __m128i onto) {
    __m128i first = _mm_clmulepi64_si128(value, by, 0x00), second = _mm_clmulepi64_si128(value, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, second), onto);
}

NX_CRC_TARGET static inline __m128i nx_crc_load(const unsigned char *data) {
    return _mm_loadu_si128((const __m128i *)data);
}

NX_CRC_TARGET static uint64_t nx_crc_clmul(const unsigned char *data, int64_t n, uint64_t crc) {
    const __m128i by128 = _mm_set_epi64x(INT64_C(0x21e9761e252621ac), (int64_t)UINT64_C(0xeadc41fd2ba3d420));
    const __m128i by1024 = _mm_set_epi64x(INT64_C(0x5f852fb61e8d92dc), (int64_t)UINT64_C(0xa1ca681e733f9c40));
    __m128i lanes[NX_CRC_LANES];
    unsigned char rest[16];
    if (n < 16 * NX_CRC_LANES)
        return nx_crc_plain(data, n, crc);
    for (int i = 0; i < NX_CRC_LANES; i++)
        lanes[i] = nx_crc_load(data + 16 * i);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_set_epi64x(0, (int64_t)crc));
    for (data += sizeof lanes, n -= sizeof lanes; n >= (int64_t)sizeof lanes; data += sizeof lanes, n -= sizeof lanes) {
        _mm_prefetch((const char *)data + NX_CRC_AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)data + NX_CRC_AHEAD + 64, _MM_HINT_T0);
        for (int i = 0; i < NX_CRC_LANES; i++)
            lanes[i] = nx_crc_fold(lanes[i], by1024, nx_crc_load(data + 16 * i));
    }
    for (int i = 1; i < NX_CRC_LANES; i++)
        lanes[0] = nx_crc_fold(lanes[0], by128, lanes[i]);
    for (; n >= 16; data += 16, n -= 16)
        lanes[0] = nx_crc_fold(lanes[0], by128, nx_crc_load(data));
    /* What is left has the same remainder as the whole message. */
    _mm_storeu_si128((__m128i *)rest, lanes[0]);
    return nx_crc_plain(data, n, nx_crc_plain(rest, sizeof rest, 0));
}

/* GCC 9, Clang 9: the first that have the instructions and know how to ask for them. */
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 9)
#define NX_CRC_WIDE_TARGET __attribute__((target("pclmul,avx512f,vpclmulqdq")))
#define NX_CRC_LEAST_WIDE 1024 /* Less is not worth starting for. */

NX_CRC_WIDE_TARGET static inline __m512i nx_crc_fold_wide(__m512i value, __m512i by, __m512i onto) {
    __m512i first = _mm512_clmulepi64_epi128(value, by, 0x00), second = _mm512_clmulepi64_epi128(value, by, 0x11);
    return _mm512_ternarylogic_epi64(first, second, onto, 0x96); /* XOR of the three. */
}

/* The same, four times as wide. */
NX_CRC_WIDE_TARGET static uint64_t nx_crc_wide(const unsigned char *data, int64_t n, uint64_t crc) {
    const __m128i near = _mm_set_epi64x(INT64_C(0x62242240ace5045a), INT64_C(0x0c32cdb31e18a84a));
    const __m128i far = _mm_set_epi64x((int64_t)UINT64_C(0xc2409e2537aa5eb1), (int64_t)UINT64_C(0xd0b3aa0ed6d54ae0));
    const __m512i by512 = _mm512_broadcast_i32x4(near), by4096 = _mm512_broadcast_i32x4(far);
    __m512i lanes[NX_CRC_LANES];
    unsigned char rest[64];
    if (n < NX_CRC_LEAST_WIDE)
        return nx_crc_clmul(data, n, crc);
    for (int i = 0; i < NX_CRC_LANES; i++)
        lanes[i] = _mm512_loadu_si512(data + 64 * i);
    lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi64_si128((int64_t)crc)));
    for (data += sizeof lanes, n -= sizeof lanes; n >= (int64_t)sizeof lanes; data += sizeof lanes, n -= sizeof lanes)
        for (int i = 0; i < NX_CRC_LANES; i++) {
            _mm_prefetch((const char *)data + 64 * i + NX_CRC_AHEAD, _MM_HINT_T0);
            lanes[i] = nx_crc_fold_wide(lanes[i], by4096, _mm512_loadu_si512(data + 64 * i));
        }
    for (int i = 1; i < NX_CRC_LANES; i++)
        lanes[0] = nx_crc_fold_wide(lanes[0], by512, lanes[i]);
    for (; n >= 64; data += 64, n -= 64)
        lanes[0] = nx_crc_fold_wide(lanes[0], by512, _mm512_loadu_si512(data));
    _mm512_storeu_si512(rest, lanes[0]);
    return nx_crc_clmul(data, n, nx_crc_plain(rest, sizeof rest, 0));
}

static int nx_crc_has_wide(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"); }
#else
#define nx_crc_wide nx_crc_clmul

static int nx_crc_has_wide(void) { return 0; }
#endif

static int nx_crc_has_clmul(void) { return __builtin_cpu_supports("pclmul"); }
#else
static uint64_t nx_crc_clmul(const unsigned char *data, int64_t n, uint64_t crc) { return nx_crc_plain(data, n, crc); }

static uint64_t nx_crc_wide(const unsigned char *data, int64_t n, uint64_t crc) { return nx_crc_plain(data, n, crc); }

static int nx_crc_has_clmul(void) { return 0; }

static int nx_crc_has_wide(void) { return 0; }
#endif

static void nx_crc_blocks(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values,
                          uint64_t (*run)(const unsigned char *, int64_t, uint64_t)) {
    pthread_once(&nx_crc_once, nx_crc_fill);
    for (int64_t i = 0; i < n_blocks; i++) {
        uint64_t crc = ~values[i];
        for (int64_t j = i * n_ranges; j < (i + 1) * n_ranges; j++)
            crc = run((const unsigned char *)(uintptr_t)addresses[j], lengths[j], crc);
        values[i] = ~crc;
    }
}

void nx_crc64nvme(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values) {
    nx_crc_blocks(addresses, lengths, n_blocks, n_ranges, values,
                  nx_crc_has_wide()    ? nx_crc_wide
                  : nx_crc_has_clmul() ? nx_crc_clmul
                                       : nx_crc_plain);
}

void nx_crc64nvme_plain(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values) {
    nx_crc_blocks(addresses, lengths, n_blocks, n_ranges, values, nx_crc_plain);
}

struct nx_turn {
    pthread_mutex_t mutex;
};

nx_turn *nx_turn_new(void) {
    nx_turn *turn = malloc(sizeof *turn);
    if (turn)
        pthread_mutex_init(&turn->mutex, NULL);
    return turn;
}

void nx_turn_free(nx_turn *turn) {
    pthread_mutex_destroy(&turn->mutex);
    free(turn);
}

/* Returns how many bytes were moved by one call. */
static int64_t nx_crc_move(nx_turn *turn, int fd, struct iovec *iov, int niov, int64_t offset) {
    ssize_t moved;
    if (!turn)
        return preadv2(fd, iov, niov, offset, RWF_NOWAIT);
    pthread_mutex_lock(&turn->mutex);
    do
        moved = pwritev(fd, iov, niov, offset);
    while (moved < 0 && errno == EINTR);
    pthread_mutex_unlock(&turn->mutex);
    return moved;
}

void nx_crc64nvme_move(nx_turn *turn, const int32_t *fds, const int64_t *offsets, const int64_t *addresses, const int64_t *lengths,
                       int64_t n_blocks, int64_t n_ranges, uint64_t *values, uint8_t *done, int64_t *next, const int32_t *stop) {
    struct iovec iov[NX_CRC_IOV];
    int64_t nbytes = 0;
    if (n_blocks < 1 || n_ranges > NX_CRC_IOV)
        return;
    for (int64_t j = 0; j < n_ranges; j++)
        nbytes += lengths[j]; /* All blocks have as many. */
    int64_t step = (turn ? NX_CRC_PUT : NX_CRC_GET) / nbytes;
    if (step > NX_CRC_IOV / n_ranges)
        step = NX_CRC_IOV / n_ranges;
    if (step < 1)
        step = 1;
    while (!__atomic_load_n(stop, __ATOMIC_RELAXED)) {
        int64_t first = __atomic_fetch_add(next, step, __ATOMIC_RELAXED);
        int64_t last = first + step < n_blocks ? first + step : n_blocks;
        if (first >= last)
            return;
        if (turn)
            nx_crc64nvme(addresses + first * n_ranges, lengths + first * n_ranges, last - first, n_ranges, values + first);
        for (int64_t i = first, end; i < last; i = end) {
            for (end = i + 1; end < last && fds[end] == fds[i] && offsets[end] == offsets[i] + (end - i) * nbytes;)
                end++;
            int niov = 0;
            for (int64_t j = i * n_ranges; j < end * n_ranges; j++)
                iov[niov++] = (struct iovec){(void *)(uintptr_t)addresses[j], (size_t)lengths[j]};
            int64_t moved = nx_crc_move(turn, fds[i], iov, niov, offsets[i]), whole = moved < 0 ? 0 : moved / nbytes;
            if (!turn)
                nx_crc64nvme(addresses + i * n_ranges, lengths + i * n_ranges, whole, n_ranges, values + i);
            memset(done + i, 1, (size_t)whole);
        }
    }
}
