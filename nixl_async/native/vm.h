typedef struct {
    int pid, pidfd, put;
    int64_t n, nbytes;
    const int64_t *local, *remote, *lengths;
    int64_t spent_ns;
} nx_vm_call;
typedef struct nx_vm_second nx_vm_second;
nx_vm_second *nx_vm_second_open(int *error);
void nx_vm_second_close(nx_vm_second *second);
int64_t nx_vm_second_joined(nx_vm_second *second);
int nx_vm_now(nx_vm_call *call, nx_vm_second *second);
