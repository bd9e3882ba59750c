/* CRC-64/NVME (NVM Express NVM Command Set Specification 1.0, 5.2.1.3.4): polynomial 0xAD93D23594C93659, bits reflected, begun with
   and inverted by ones. With carry-less multiplication where the processor has it, else by tables, eight bytes at a time. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "checksum.h"

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
    for (data += sizeof lanes, n -= sizeof lanes; n >= (int64_t)sizeof lanes; data += sizeof lanes, n -= sizeof lanes)
        for (int i = 0; i < NX_CRC_LANES; i++)
            lanes[i] = nx_crc_fold(lanes[i], by1024, nx_crc_load(data + 16 * i));
    for (int i = 1; i < NX_CRC_LANES; i++)
        lanes[0] = nx_crc_fold(lanes[0], by128, lanes[i]);
    for (; n >= 16; data += 16, n -= 16)
        lanes[0] = nx_crc_fold(lanes[0], by128, nx_crc_load(data));
    /* What is left has the same remainder as the whole message. */
    _mm_storeu_si128((__m128i *)rest, lanes[0]);
    return nx_crc_plain(data, n, nx_crc_plain(rest, sizeof rest, 0));
}

static int nx_crc_has_clmul(void) { return __builtin_cpu_supports("pclmul"); }
#else
static uint64_t nx_crc_clmul(const unsigned char *data, int64_t n, uint64_t crc) { return nx_crc_plain(data, n, crc); }

static int nx_crc_has_clmul(void) { return 0; }
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
    nx_crc_blocks(addresses, lengths, n_blocks, n_ranges, values, nx_crc_has_clmul() ? nx_crc_clmul : nx_crc_plain);
}

void nx_crc64nvme_plain(const int64_t *addresses, const int64_t *lengths, int64_t n_blocks, int64_t n_ranges, uint64_t *values) {
    nx_crc_blocks(addresses, lengths, n_blocks, n_ranges, values, nx_crc_plain);
}
