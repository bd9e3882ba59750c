"""A pytest plug-in: `dynamo.nixl_connect` is this library's module, for Dynamo's own code and tests."""

import sys

import dynamo

from nixl_async.integrations import dynamo_connect

sys.modules["dynamo.nixl_connect"] = dynamo.nixl_connect = dynamo_connect
