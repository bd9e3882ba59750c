typedef struct {
    int pid, pidfd, put;
    int64_t n;
    const int64_t *local, *remote, *lengths;
    int64_t spent_ns;
} nx_vm_call;
int nx_vm_now(nx_vm_call *call);
