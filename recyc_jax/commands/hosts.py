"""Runs over several hosts, such as those of a TPU slice: every process runs the same program on its own devices, and
only the first process reads and writes the results folder."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from recyc_jax.commands import companions, relay, second_signal, together

TIMEOUT = 300  # seconds that a process waits for the others to appear
_EACH = 30  # seconds between the lines that say so
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_HEARTBEAT = 60  # seconds after which JAX holds a process dead, should `companions.py` not have found that out


def join(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, cluster: bool = False
) -> None:
    """Connect to the run's other processes, and watch them from then on (`together.py`): those at the address of
    `coordinator` (HOST:PORT of process 0), or those that the cluster's settings name; otherwise those that the
    environment names, if any: a TPU slice of several hosts, or JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Raises ValueError if the processes do not find each other; ends the process with such an error if
    they do not appear."""
    if coordinator is None and not cluster and os.environ.get("JAX_COORDINATOR_ADDRESS"):
        coordinator = os.environ["JAX_COORDINATOR_ADDRESS"]
        try:
            processes, process_id = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set: whole numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID go with it"
            ) from None
    slice_of_several = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if coordinator or cluster or slice_of_several or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        _connect(coordinator, processes, process_id)


def join_named() -> None:
    """Connect to the other processes if JAX_COORDINATOR_ADDRESS names any. Commands do so before they check their flags,
    so that the others learn of an error in one process's flags."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        join()


def _connect(address: str | None, processes: int | None, process_id: int | None) -> None:
    import jax

    given: dict[str, Any] = {"num_processes": processes, "process_id": process_id}
    # longer than our own time: JAX aborts the process when its time is over
    given["initialization_timeout"] = TIMEOUT + 60
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        given["heartbeat_timeout_seconds"] = _HEARTBEAT
    if address is not None:
        _check(address, here=process_id == 0 and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"))
    through = None
    if process_id and address is not None and not any(map(os.environ.get, _PROXIES)):  # gRPC would look for it there
        with contextlib.suppress(OSError):
            through = relay.Relay(address)
    given["coordinator_address"] = address if through is None else through.address
    who = "this process" if process_id is None else f"process {process_id} of {processes}"
    where = "" if address is None else f" (process 0 is expected at {address})"
    try:
        with second_signal.ending_at_once(), _saying_how_long(f"{who} has waited", f"for the others{where}"):
            jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the run's processes did not find each other: {str(error).splitlines()[0]}") from None
    together.watch(through)


def _check(address: str, here: bool) -> None:
    """Raise ValueError if the address of process 0 is not HOST:PORT, or if this is its process (`here`) and another
    program listens on that port: some versions of JAX crash then."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"the address of process 0 must be HOST:PORT, not {address!r}")
    if here:
        ipv6 = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        try:
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=ipv6).close()
        except OSError as error:
            raise ValueError(f"process 0 cannot listen at {address}: {error.strerror}") from None


@contextlib.contextmanager
def _saying_how_long(before: str, after: str) -> Iterator[None]:
    """Within the block, a thread says every half minute how long it has lasted, and ends the process after TIMEOUT."""
    found = threading.Event()

    def wait() -> None:
        began = time.monotonic()
        while not found.wait(min(_EACH, TIMEOUT)):
            seconds = round(time.monotonic() - began)
            if seconds < TIMEOUT:
                print(f"{before} {seconds} s {after}", file=sys.stderr, flush=True)
                continue
            print(f"error: the run's processes did not find each other: {before} {seconds} s {after}", file=sys.stderr)
            companions.leave(2)

    threading.Thread(target=wait, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        found.set()


def is_first() -> bool:
    """Whether this is the first process, which writes the results."""
    import jax

    return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """Call `make` in the first process only; all processes return its result (a JSON value) or raise its ValueError."""
    import jax

    if jax.process_count() == 1:
        return make()
    import numpy as np
    from jax.experimental import multihost_utils

    error, value = None, None
    if is_first():
        try:
            value = make()
        except ValueError as raised:
            error = str(raised)
    said = np.frombuffer(json.dumps([error, value]).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(said.size)))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, said.size)] = said[:size]
    error, value = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if error is not None:
        raise ValueError(error)
    return value
