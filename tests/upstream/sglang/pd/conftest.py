"""SGLang is importable in the tests beside this file."""

import stubs

stubs.install()
