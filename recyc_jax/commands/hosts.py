"""Runs over several hosts, such as those of a TPU slice: every process runs the same program on its own devices, and
only the first process reads and writes the results folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any


def join() -> None:
    """Connect to the run's other processes if the environment names any: a TPU slice of several hosts, or
    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises ValueError if the processes do not find
    each other."""
    import jax

    given: dict[str, Any] = {}
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            given = {
                "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
                "process_id": int(os.environ["JAX_PROCESS_ID"]),
            }
        except (KeyError, ValueError):
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set: whole numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID go with it"
            ) from None
    elif "," not in os.environ.get("TPU_WORKER_HOSTNAMES", "") and not os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the run's hosts did not find each other: {str(error).splitlines()[0]}") from None


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


def fetched(array: Any) -> Any:
    """The whole array as a numpy array in every process, however it is sharded."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
