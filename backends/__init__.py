"""What moves the bytes: one file for each backend; the contract is `nixl_async.backend`."""
