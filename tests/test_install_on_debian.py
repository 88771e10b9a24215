"""./install as it is shipped, on an empty Debian with nothing but the packages that it names.

.debian-tests keeps what mmdebstrap has made, as that takes a minute for each release. The commands
run in namespaces of their own: their mounts, processes and ports end with them.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import require
from servers.process import ROOT, run

CACHE = ROOT / ".debian-tests"
INCLUDE = "--include=python3,python3-venv,supervisor"
FILES = ["install", "Testfile", "mysql.sql", "saslquota.json", "quotarules.json"]
NAMESPACES = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]

ENTER = """
set -e
root=$1
for node in null zero random urandom; do
    : >$root/dev/$node.new; mv $root/dev/$node.new $root/dev/$node
    mount --bind /dev/$node $root/dev/$node
done
mount -t proc proc $root/proc
ip link set lo up
exec env -i HOME=/root PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin chroot $root bash -c "$2"
"""

ADMINISTRATOR = r"""
cd /root/saslquota
step() { echo "=== $1"; shift; "$@" 2>&1; echo "status $?"; }
ask() { exec 3<>/dev/tcp/127.0.0.1/10008; cat Testfile >&3; head -n 1 <&3; exec 3>&-; }
version() {
    sed -n 's/^__version__ = //p' /opt/saslquota/saslquota.py
    supervisorctl status saslquota
}
step early ./install
service supervisor start >/dev/null
until supervisorctl pid >/dev/null 2>&1; do sleep 0.1; done
step first ./install
step ask ask
step again ./install
sed -i 's/^__version__ = .*/__version__ = "9.1"/' saslquota.py
step upgrade ./install
sed -i 's/"9.1"/"9.2"/; s/return run_daemon(config)/raise SystemExit("boom")/' saslquota.py
step in-vain ./install
step version version
step control saslquotactl.py --version
step owner stat -c '%U %a' /opt/saslquota/saslquota.json /var/lib/saslquota
step uninstall ./install --uninstall
step user id saslquota
step rest find /opt /etc/supervisor /usr/local /var/lib -name '*saslquota*'
"""


@pytest.fixture
def bare(request: pytest.FixtureRequest, new_directory: Callable[[], Path]) -> Path:
    """The root directory of a fresh Debian, with the shipped files in /root/saslquota."""
    require("mmdebstrap", "unshare", "ip", root=True)
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        pytest.skip("no rights to make namespaces")
    archive = CACHE / f"{request.param}.tar"
    if not archive.exists():
        CACHE.mkdir(exist_ok=True)
        new = archive.with_suffix(".new.tar")
        form = ["$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
        mirror = run(["apt-get", "indextargets", "--format", *form]).split()
        make = ["mmdebstrap", "--variant=minbase", "--dpkgopt=force-unsafe-io", INCLUDE]
        command = [*NAMESPACES, *make, request.param, str(new), *mirror[:1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        new.rename(archive)
    root = new_directory()
    subprocess.check_call(["tar", "-C", root, "-xf", archive])
    shipped = root / "root" / "saslquota"
    shipped.mkdir()
    for path in [
        *(ROOT / name for name in FILES),
        *ROOT.glob("saslquota*.py"),
        *ROOT.glob("*.conf"),
    ]:
        shutil.copy(path, shipped)
    return root


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("bare", ["bookworm", "trixie"], indirect=True)
def test_debian(bare: Path) -> None:
    """From the first to the last command, as an administrator types them."""
    command = [*NAMESPACES, "--net", "bash", "-c", ENTER, "enter", str(bare), ADMINISTRATOR]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    steps = dict(part.split("\n", 1) for part in done.stdout.split("=== ")[1:])
    print(done.stdout, done.stderr)

    assert "first: service supervisor start\nstatus 1" in steps["early"]
    for said in ("user saslquota: made", "/opt/saslquota/venv: made", "runs\n", "status 0"):
        assert said in steps["first"]
    assert steps["ask"] == "action=OK\nstatus 0\n"
    assert "saslquota: up to date, and runs" in steps["again"]
    assert "saslquota: 9.1 runs" in steps["upgrade"]
    assert "boom" in steps["in-vain"]
    assert "the old one is back, and runs\nstatus 1" in steps["in-vain"]
    assert steps["version"].startswith('"9.1"\nsaslquota ')
    assert "RUNNING" in steps["version"]
    assert steps["control"] == "saslquota 9.1\nstatus 0\n"
    assert steps["owner"] == "root 640\nsaslquota 750\nstatus 0\n"
    assert "status 0" in steps["uninstall"]
    assert "no such user" in steps["user"]
    assert steps["rest"] == "status 0\n"
    backup = bare / "var/backups/saslquota/saslquota.json"
    assert json.loads(backup.read_text("utf-8"))["_loglevel"] == "INFO"
