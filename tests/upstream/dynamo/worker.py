"""A Dynamo worker with one connector, on uvloop like all of them, told by lines of JSON; the argument is what it connects by.

The module is `dynamo.nixl_connect`, or this library's in its place: the program is the same.
"""

import asyncio
import hashlib
import importlib
import json
import os
import sys
import time

import torch
import uvloop


class Worker:
    def __init__(self, module, name):
        self.module = module
        self.connector = module.Connector(name)
        self.slots = {}
        self.passive = {}

    def memory(self, slot, sizes, fill=None, fresh=False):
        """Return the slot's tensors and descriptors, made once; `fresh` makes the descriptors anew."""
        if slot not in self.slots:
            tensors = [torch.zeros(nbytes, dtype=torch.uint8) for nbytes in sizes]
            self.slots[slot] = tensors, [self.module.Descriptor(tensor) for tensor in tensors]
        tensors, descriptors = self.slots[slot]
        if fresh:
            descriptors = [self.module.Descriptor(tensor) for tensor in tensors]
            self.slots[slot] = tensors, descriptors
        if fill is not None:
            generator = torch.Generator().manual_seed(fill)
            for tensor in tensors:
                tensor.copy_(torch.randint(0, 255, tensor.shape, dtype=torch.uint8, generator=generator))
        return descriptors if len(descriptors) > 1 else descriptors[0]

    async def expose(self, kind, slot, sizes, fill=None, fresh=False):
        descriptors = self.memory(slot, sizes, fill, fresh)
        make = self.connector.create_readable if kind == "read" else self.connector.create_writable
        operation = await make(descriptors)
        metadata = operation.metadata().model_dump()
        self.passive[slot] = asyncio.create_task(self.wait(operation))
        return {"metadata": metadata}

    async def wait(self, operation):
        with operation:
            await operation.wait_for_completion()
            return {"at": time.monotonic(), "status": operation.status.name}

    async def ended(self, slot):
        return await self.passive.pop(slot)

    async def move(self, kind, slot, sizes, metadata, fill=None, fresh=False):
        descriptors = self.memory(slot, sizes, fill, fresh)
        metadata = self.module.RdmaMetadata.model_validate(metadata)
        began = time.monotonic()
        if kind == "read":
            operation = await self.connector.begin_read(metadata, descriptors)
        else:
            operation = await self.connector.begin_write(descriptors, metadata)
        with operation:
            await operation.wait_for_completion()
        return {"began": began, "seconds": time.monotonic() - began, "status": operation.status.name}

    async def digest(self, slot):
        return {"digests": [hashlib.sha256(tensor.numpy()).hexdigest() for tensor in self.slots[slot][0]]}


async def main():
    # What is logged to standard output must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    worker = Worker(module, sys.argv[2])
    orders = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        order = json.loads(line)
        try:
            answer = await getattr(worker, order.pop("do"))(**order)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


uvloop.run(main())
