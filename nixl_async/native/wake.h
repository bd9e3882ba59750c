typedef struct nx_signals nx_signals;
nx_signals *nx_signals_open(void);
int nx_signals_fd(nx_signals *signals);
void *nx_signals_add(nx_signals *signals, uint64_t token);
int64_t nx_signals_collect(nx_signals *signals, uint64_t *tokens, int64_t room);
void nx_signals_close(nx_signals *signals);
void nx_signal_fire(void *argument);
void nx_signal_drop(void *argument);
uintptr_t nx_signal_function(void);
