"""Entry point of a worker process: ``python -m inferpool.worker``, started by the host."""

from __future__ import annotations

import faulthandler
import importlib
import sys
from typing import Any

import msgspec

from inferpool import _transport, codec
from inferpool.messages import Start, WorkerArguments
from inferpool.worker.runtime import report_failure, run_worker


def main(argument: str) -> int:
    """Attach to the channel that the host passed down and run the role it asks for.

    Returns:
        The exit status: 0 after a shutdown, 1 when the role could not start.
    """
    # A native crash leaves its Python stack in the log.
    faulthandler.enable()
    arguments = msgspec.json.decode(argument, type=WorkerArguments)
    channel = _transport.WorkerChannel(
        arguments.fds,
        host_pid=arguments.host_pid,
        frame_limit=arguments.frame_limit,
        wait=arguments.wait,
    )
    request = channel.receive()
    if request is None:  # shut down before it was told what to be
        return 0
    start = codec.decode_as(request.parts, Start)
    sys.path[:] = start.sys_path
    try:
        run_worker(
            channel,
            start,
            session_factory=import_attribute(start.session),
            kind_handlers=import_attribute(start.handlers),
            start_request=request,
        )
    except BaseException as error:
        report_failure(request, error)
        raise
    return 0


def import_attribute(path: str) -> Any:
    """Import what ``"package.module:attribute"`` names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


sys.exit(main(sys.argv[1]))
