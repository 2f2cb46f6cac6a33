"""Handlers of signals are a command's own only while it runs."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("typer")


from tests.cli.test_interrupts import ENVIRONMENT


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals")
def test_handlers_of_a_program_around_it_stay():
    """Its own one, and what `nohup` ignores; and no other thread than the main one sets any."""
    program = """
        import signal, sys, threading
        from paramlora import cli
        from paramlora.cli import stops
        def own(*_): pass
        def handlers(): return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for here in (own, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, here)
            with stops.heeded():
                assert (handlers()[0] is own) == (here is own)
                assert handlers()[1] is signal.SIG_IGN
            assert handlers() == [here, signal.SIG_IGN]
        codes = []
        def run():
            try: cli.main(["--version"])
            except SystemExit as done: codes.append(done.code)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert codes == [0]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
