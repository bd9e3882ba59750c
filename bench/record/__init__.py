"""The complete run, recorded: a sweep beside NIXL and every suite in one command, as JSON, and the document made of it."""
