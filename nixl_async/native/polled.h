void *nx_polled(void);
