"""A real Slurm of virtual nodes on this machine. It goes with the process that asked for it, however that one ends.

    with Cluster(nodes=2) as slurm:
        slurm.run("sbatch", "--nodes=2", ...)

All of it lives in one namespace of processes, whose first process waits for the end of its input and takes the others
with it. The login host and each node have a network and a host name of their own, joined by a bridge: 10.77.0.1 is
`login`, the nodes follow, and nothing listens outside. What jobs write, all nodes and the tests see.

By hand: `python -m tests.slurm_cluster COMMAND ...` runs a command there, such as a shell, on the login host.
"""

import contextlib
import ctypes
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "nsenter", "ip", "mount")
FREEZER = Path("/sys/fs/cgroup/freezer")
STARTS_WITHIN_S, WAIT_S = 60, 240
GPUS, CPUS, MEMORY_MB = (
    8,
    64,
    500_000,
)  # of a node, as the batch scripts ask for them; the GPUs are files like /dev/null

SLURM_CONF = """
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/{track}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
ReturnToService=1
SlurmdTimeout=20
MinJobAge=36000
FirstJobId={job}
KillWait=10
CompleteWait=0
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={prefix}[1-{nodes}] CPUs={cpus} RealMemory={memory} Gres=gpu:fake:{gpus} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for it; None: nothing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client iproute2)"
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    trial = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    spaces = ["unshare", "--pid", "--fork", "--net", "--uts", "--mount", "--mount-proc"]
    if subprocess.run([*spaces, "sh", "-c", trial], capture_output=True).returncode:
        return "no namespaces, or no bridge between networks, can be made here"
    return None


def wait(done: Callable[[], bool], what: str, every_s: float = 0.1, within_s: float = WAIT_S) -> None:
    """Until `done()`; AssertionError when it takes too long. Asking Slurm costs more than a look at a file."""
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, f"waited {within_s} s until {what}"
        time.sleep(every_s)


class Job:
    """A job of such a cluster."""

    def __init__(self, slurm: "Cluster", id: str, folder: Path) -> None:
        self.slurm, self.id, self.folder = slurm, id, folder

    @property
    def output(self) -> str:
        """What its script has said."""
        return (self.folder / f"slurm-{self.id}.out").read_text()

    def field(self, name: str) -> str:
        """Of `scontrol show job`."""
        found = self.slurm.run("scontrol", "show", "job", "-o", self.id)
        return dict(word.split("=", 1) for word in found.split() if "=" in word)[name]

    @property
    def state(self) -> str:
        return self.field("JobState")

    def wait(self, *states: str, within_s: float = WAIT_S) -> None:
        """Until it is in one of these states."""
        wait(lambda: self.state in states, f"job {self.id} is {' or '.join(states)}", 0.5, within_s)


class Cluster:
    """Slurm with some nodes; a context manager."""

    def __init__(self, nodes: int = 2) -> None:
        self.prefix = f"t{os.getpid()}n"
        self.nodes = [f"{self.prefix}{number}" for number in range(1, nodes + 1)]

    def __enter__(self) -> Self:
        # a short name, as sockets lie there
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        track = "cgroup" if (FREEZER / "release_agent").exists() else "linuxproc"
        conf = SLURM_CONF.format(
            folder=self.folder, track=track, prefix=self.prefix, nodes=len(self.nodes), cpus=CPUS, memory=MEMORY_MB,
            gpus=GPUS,
            job=os.getpid(),  # a later cluster has other numbers, as the logs of a run go by them
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        spaces = ["--pid", "--fork", "--kill-child", "--net", "--uts", "--mount", "--mount-proc"]
        self._process = subprocess.Popen(
            ["unshare", *spaces, sys.executable, "-m", "tests.slurm_cluster", str(self.folder), *self.nodes],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=self._environ() | {"MM_SLURM_CLUSTER": "host"},
        )
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            logs = self._process.communicate()[0]
            raise AssertionError(f"Slurm has not started:\n{logs}")
        pid = self._process.pid
        self._first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)

    def command(self, *words: str | Path, cwd: Path | None = None) -> list[str]:
        """A command that runs others on the login host."""
        place = cwd or Path.cwd()
        return ["nsenter", "-t", self._first, "-p", "-m", "-n", "-u", f"--wd={place}", *map(str, words)]

    def run(self, *words: str | Path, cwd: Path | None = None, **environ: str) -> str:
        """What a command on the login host prints. AssertionError when it does not end well."""
        done = subprocess.run(
            self.command(*words, cwd=cwd),
            env=self._environ() | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stdout}"
        return done.stdout

    def submit(self, folder: Path, *words: str | Path, **environ: str) -> Job:
        """`sbatch` from a folder."""
        return Job(self, self.run("sbatch", "--parsable", *words, cwd=folder, **environ).strip(), folder)

    def _environ(self) -> dict[str, str]:
        ours = ("SLURM", "SBATCH", "MM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PYTHON")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        path = f"{kept.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
        return kept | {"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}


def host(folder: Path, nodes: Sequence[str]) -> None:
    """Start everything, say `ready`, and wait for the end of the input. The first process of them all."""
    ctypes.CDLL(None).mount(
        None, b"/", None, 0x4000 | 0x40000, None
    )  # MS_REC | MS_PRIVATE: no mount gets out
    addresses = {"login": "10.77.0.1"} | {node: f"10.77.0.{11 + i}" for i, node in enumerate(nodes)}
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    for number in range(GPUS):
        if not (folder / f"gpu{number}").exists():
            os.mknod(folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu Type=fake File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")  # without the file proctrack/cgroup fails
    (folder / "state").mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))

    sh(f"hostname login && mount --bind {folder}/hosts /etc/hosts && ip link set lo up")
    sh("ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up")
    enter = {}
    for number, node in enumerate(nodes):
        holder = subprocess.Popen(["unshare", "--net", "--uts", "sleep", "infinity"])
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.005)
        enter[node] = f"nsenter -t {holder.pid} -n -u "
        sh(
            f"ip link add v{number} type veth peer name eth0 netns {holder.pid} && ip link set v{number} master br0 up"
        )
        sh(f"{enter[node]} sh -c 'hostname {node}; ip link set lo up; ip link set eth0 up'")
        sh(f"{enter[node]} ip addr add {addresses[node]}/24 dev eth0")
    munge = [
        "key-file=munge.key",
        "socket=munge.sock",
        "pid-file=munged.pid",
        "log-file=munged.log",
        "seed-file=munged.seed",
    ]
    sh("munged --force " + " ".join("--" + one.replace("=", f"={folder}/") for one in munge))
    sh("slurmctld")
    for node in nodes:
        sh(f"{enter[node]} slurmd -N {node}")
    deadline = time.monotonic() + STARTS_WITHIN_S
    while output("sinfo -h -p debug -t idle -o %D") != str(len(nodes)):
        if time.monotonic() > deadline:
            for log in sorted(folder.glob("*.log")):
                print(f"{log.name}: {log.read_text(errors='replace')[-2000:]}")
            return
        time.sleep(0.1)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.5)[0]:
        with contextlib.suppress(ChildProcessError):  # those whose parents are gone
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def end(folder: Path, nodes: Sequence[str]) -> None:
    """Kill all but this process, and remove what Slurm has left."""
    assert os.getpid() == 1, "this would kill every process of the machine"
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(-1, 9)
        while True:
            os.wait()
    for node in nodes:
        for group, _, _ in os.walk(FREEZER / f"slurm_{node}", topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(group)
    shutil.rmtree(folder, ignore_errors=True)


def sh(line: str) -> None:
    subprocess.run(["sh", "-ec", line], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def output(line: str) -> str:
    done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip()


if __name__ == "__main__":
    if os.environ.pop("MM_SLURM_CLUSTER", "") == "host":
        folder, *nodes = sys.argv[1:]
        try:
            host(Path(folder), nodes)
        finally:
            end(Path(folder), nodes)
    else:
        with Cluster() as slurm:
            sys.exit(subprocess.run(slurm.command(*sys.argv[1:]), env=slurm._environ()).returncode)
