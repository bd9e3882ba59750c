/* Launches of kernels by CUDA's driver in one call: made one by one from Python, with caches gone cold, they take longer than a
 * small copy. The driver's library is loaded by others, who say where its functions are.
 */
#include <stddef.h>
#include <stdint.h>

#define MAX_ARGUMENTS 8

static struct {
    int (*push)(void *context);
    int (*pop)(void **context);
    int (*launch)(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                  void *stream, void **arguments, void **extra);
    int (*query)(void *stream);
} launches;

void nx_cuda_use(uintptr_t push, uintptr_t pop, uintptr_t launch, uintptr_t query) {
    launches.push = (int (*)(void *))push;
    launches.pop = (int (*)(void **))pop;
    launches.launch = (int (*)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **))launch;
    launches.query = (int (*)(void *))query;
}

/* In `context`, or, if that is 0, in the current one. 32-bit parameters are the arguments' low halves: all that CUDA runs on is
 * little-endian. Returns the driver's first error. */
int nx_cuda_launch(uintptr_t context, uintptr_t stream, uintptr_t kernel, uint32_t blocks, uint32_t threads, uint64_t *arguments, int n) {
    void *pointers[MAX_ARGUMENTS], *popped;
    for (int i = 0; i < n && i < MAX_ARGUMENTS; i++)
        pointers[i] = &arguments[i];
    int code = context ? launches.push((void *)context) : 0;
    if (code)
        return code;
    code = launches.launch((void *)kernel, blocks, 1, 1, threads, 1, 1, 0, (void *)stream, pointers, NULL);
    if (context)
        launches.pop(&popped);
    return code;
}

int nx_cuda_query(uintptr_t stream) { return launches.query((void *)stream); }
