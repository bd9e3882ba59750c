/* Copies past the cache. Included by the engines that spread what has arrived over many small places. */
#ifndef NX_PAST_CACHE_C
#define NX_PAST_CACHE_C
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* How far ahead the source is fetched, bytes. */
#define PAST_CACHE_AHEAD 1024

/* Copies to memory that is not read soon: written the common way, each line would be fetched first. */
static void copy_past_cache(char *dst, const char *src, size_t n) {
#if defined(__SSE2__)
    if (n >= 512) {
        size_t first = -(uintptr_t)dst & 63;
        memcpy(dst, src, first);
        dst += first;
        src += first;
        for (n -= first; n >= 64; n -= 64, dst += 64, src += 64) {
            _mm_prefetch(src + PAST_CACHE_AHEAD, _MM_HINT_T0);
            __m128i a = _mm_loadu_si128((const __m128i *)(const void *)src);
            __m128i b = _mm_loadu_si128((const __m128i *)(const void *)(src + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(const void *)(src + 32));
            __m128i d = _mm_loadu_si128((const __m128i *)(const void *)(src + 48));
            _mm_stream_si128((__m128i *)(void *)dst, a);
            _mm_stream_si128((__m128i *)(void *)(dst + 16), b);
            _mm_stream_si128((__m128i *)(void *)(dst + 32), c);
            _mm_stream_si128((__m128i *)(void *)(dst + 48), d);
        }
    }
#endif
    memcpy(dst, src, n);
}

/* What was copied so is seen by others before anything that is stored later. */
static void past_cache_done(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
#endif
