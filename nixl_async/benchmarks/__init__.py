"""The benchmark programs that are installed with the library: `nixl-async bench …`."""
