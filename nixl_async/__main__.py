"""`python -m nixl_async` is `nixl-async`."""

from nixl_async.cli import main

main()
