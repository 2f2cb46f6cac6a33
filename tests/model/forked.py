"""Processes, joined as torchrun joins its own, forked from this one, which has imported all.

To start each anew takes ten seconds of imports. torchrun itself starts the example of many
processes (`tests/test_examples.py`) and the failing script of `tests/test_benchmark_runs.py`.
"""

import contextlib
import io
import os
import traceback

import torch
import torch.distributed as dist

# how multiprocessing starts processes that compute: none that is forked can use CUDA
METHOD = "fork" if hasattr(os, "fork") and not torch.cuda.is_available() else "spawn"


def both(main, *arguments):
    """What the first of two processes prints that call `main` with arguments."""
    return several(2, main, *arguments)


def several(count, main, *arguments):
    """As `both`, of so many."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [os.pipe() for _ in range(count)]
    children = [_forked(rank, store.port, pipes, main, arguments) for rank in range(count)]
    for _, end in pipes:
        os.close(end)
    told = []
    for pipe, _ in pipes:
        with open(pipe, encoding="utf-8") as stream:
            told.append(stream.read())
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), "\n".join(told)
    return told[0]


def _forked(rank, port, pipes, main, arguments):
    child = os.fork()
    if child:
        return child
    code, said = 1, io.StringIO()
    try:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(pipes), "MASTER_PORT": port}
        told |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in told.items()})
        torch.cuda.is_available = lambda: False  # which no forked process can use
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(*arguments)
    except BaseException:
        said.write(traceback.format_exc())
    finally:
        with (
            contextlib.suppress(BaseException),
            open(pipes[rank][1], "w", encoding="utf-8") as stream,
        ):
            stream.write(said.getvalue())
        os._exit(code)
