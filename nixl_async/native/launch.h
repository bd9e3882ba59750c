void nx_cuda_use(uintptr_t push, uintptr_t pop, uintptr_t launch, uintptr_t query);
int nx_cuda_launch(uintptr_t context, uintptr_t stream, uintptr_t kernel, uint32_t blocks, uint32_t threads, uint64_t *arguments, int n);
int nx_cuda_query(uintptr_t stream);
