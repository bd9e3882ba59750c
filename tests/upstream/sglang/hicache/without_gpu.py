"""Importing this first lets SGLang be imported where there is no GPU."""

import stubs

stubs.install()
