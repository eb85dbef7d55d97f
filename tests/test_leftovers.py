"""The check at the end of a session sees what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.leftovers import processes


def test_a_process_that_lives_on_is_seen():
    mark = os.environ["INTERNLM_LITE_TESTS"]
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert " ".join(command) in processes(mark)[process.pid]
        process.communicate(b"\n")
    assert process.pid not in processes(mark) and os.getpid() not in processes(mark)
