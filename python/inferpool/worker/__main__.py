"""Entry point of a worker process: ``python -m inferpool.worker``, started by the host."""

from __future__ import annotations

import faulthandler
import os
import sys

import msgspec

from inferpool import _transport
from inferpool.messages import SandboxReport, Start, WorkerArguments
from inferpool.worker.sandbox import enter_sandbox, import_attribute


def main(argument: str) -> int:
    """Attach to the channel that the host passed down and run the role it asks for.

    Returns:
        The exit status: 0 after a shutdown, 1 when the role could not start.
    """
    # A native crash leaves its Python stack in the log.
    faulthandler.enable()
    arguments = msgspec.json.decode(argument, type=WorkerArguments)
    sandbox: SandboxReport | Exception
    try:
        sandbox = enter_sandbox(arguments)
    except Exception as error:  # noqa: BLE001  # the host learns of it once it can be told
        sandbox = error
    # Programs that a handler starts must not keep the channel open when this one has ended.
    for fd in arguments.fds:
        os.set_inheritable(fd, False)
    # Threads may exist from here on: the channel's heartbeat, and those of numpy's BLAS.
    channel = _transport.WorkerChannel(
        arguments.fds,
        host_pid=arguments.host_pid,
        frame_limit=arguments.frame_limit,
        wait=arguments.wait,
    )
    from inferpool import codec
    from inferpool.worker.runtime import report_failure, run_worker

    request = channel.receive()
    if request is None:  # shut down before it was told what to be
        return 0
    start = codec.decode_as(request.parts, Start)
    sys.path[:] = start.sys_path
    try:
        if isinstance(sandbox, Exception):
            raise sandbox
        run_worker(
            channel,
            start,
            session_factory=import_attribute(start.session),
            kind_handlers=import_attribute(start.handlers),
            start_request=request,
            sandbox=sandbox,
        )
    except BaseException as error:
        report_failure(request, error)
        raise
    return 0


sys.exit(main(sys.argv[1]))
