"""A notebook's kernel, as Jupyter starts one: what its cells show, and how a cell ends."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[1]
LONGEST = 500.0  # seconds of a cell, on a machine that is busy with much else


class Ran(NamedTuple):
    """How a cell ended, and what it showed: all that came, also what was written over."""

    status: str  # "ok" or "error"
    error: str  # "NAME: what it says", empty where there is none
    printed: str  # on standard output
    warned: str  # on standard error
    shown: list[str]  # texts that were displayed
    changed: list[str]  # texts that took the place of one that was displayed


@contextlib.contextmanager
def kernel(folder):
    """Start one that works in a folder; gives a function that runs a cell: (source, what is called of each message).

    It talks over files in a folder of its own and reads no settings of the user's, so that many may run side by side.
    """
    with tempfile.TemporaryDirectory() as place:  # a short name, which pytest's are not: a socket's has 100 characters
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{place}/k")
        own = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": f"{place}/ipython", "JAX_PLATFORMS": "cpu"}
        manager.start_kernel(cwd=str(folder), env=os.environ | own)
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=LONGEST)
            yield lambda source, hear=None: _run(client, source, hear and (lambda message: hear(manager, message)))
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def _run(client, source, hear):
    streams, shown, changed = {"stdout": "", "stderr": ""}, [], []

    def note(message):
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            streams[content["name"]] += content["text"]
        elif kind in ("display_data", "execute_result"):
            shown.append(content["data"].get("text/plain", ""))
        elif kind == "update_display_data":
            changed.append(content["data"]["text/plain"])
        if hear:
            hear(message)

    # Else a kernel whose cell failed throws away what it is sent in the next moment: this function's next cell.
    one_by_one = {"stop_on_error": False}
    reply = client.execute_interactive(source, timeout=LONGEST, output_hook=note, **one_by_one)["content"]
    error = f"{reply['ename']}: {reply['evalue']}" if reply["status"] == "error" else ""
    return Ran(reply["status"], error, streams["stdout"], streams["stderr"], shown, changed)
