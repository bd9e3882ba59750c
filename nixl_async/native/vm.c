/* Copies between this process and another that are made again and again, with all that one needs in one place. */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>

#include "copy.h"
#include "vm.h"

/* Returns what `nx_process_vm` does, and -ESRCH when the process has ended: its number may be another's by then. */
int nx_vm_now(nx_vm_call *call) {
    struct pollfd alive = {.fd = call->pidfd, .events = POLLIN};
    if (poll(&alive, 1, 0) > 0)
        return -ESRCH;
    return nx_process_vm(call->pid, call->put, call->local, call->remote, call->lengths, call->n, NULL, &call->spent_ns);
}
