"""Several hosts on one machine.

A host is a network, UTS, PID and mount namespace with one interface, eth0. A bridge in another
network namespace joins them, or a process that loses and delays packets, because not every kernel
has netem. All of it hangs on processes that end with this one, so that nothing is left behind, and
the machine's own interfaces are not touched. Needs root and iproute2.
"""

import collections
import contextlib
import ctypes
import fcntl
import functools
import json
import os
import random
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from iomm.engine.parallel.cpu_ranks import PR_SET_PDEATHSIG

INTERFACE = "eth0"
# From linux/if_tun.h.
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@functools.cache
def why_not():
    """Return why this machine cannot have hosts, or None."""
    if os.geteuid():
        return "network namespaces need root"
    for tool in ("ip", "bridge", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    script = "ip link add br0 type bridge && ip link add p0 type veth peer name p1"
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", script],
        capture_output=True,
        text=True,
    )
    return None if made.returncode == 0 else f"namespaces: {made.stderr.strip()}"


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hold(*namespaces, script="exec sleep infinity"):
    """Create namespaces, and return (process id in them that keeps them alive, unshare's process).

    The script runs in the namespaces and must end in that process.
    """
    command = ["unshare", *namespaces, "sh", "-c", f"echo $$; {script}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        # unshare --kill-child complains when it ends by a signal.
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=die_with_parent,
    )
    if not process.stdout.readline():
        raise OSError(f"{shlex.join(command)} failed")
    if "--fork" not in namespaces:
        return process.pid, process
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(children.read_text().split()[0]), process


class Hosts:
    """`number` hosts, h0, h1, ... at 10.77.0.1, 10.77.0.2, ... Use as a context.

    With shared_pids, the hosts have the same name and PID namespace, as containers of one pod. With
    delay_s, every packet takes that long and the share `loss` of them is lost.
    """

    def __init__(self, number, shared_pids=False, delay_s=0.0, loss=0.0):
        self.number = number
        self.delay_s = delay_s
        self.loss = loss
        self.shared_pids = shared_pids
        self.names = [f"h{i}" for i in range(number)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(number)]
        lines = [f"{a} {name}" for a, name in zip(self.addresses, self.names, strict=True)]
        self.folder = tempfile.TemporaryDirectory(prefix="iomm-hosts-")
        self.table = Path(self.folder.name) / "hosts"
        self.table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self.holders, self.processes = [0] * number, [None] * number

    def __enter__(self):
        if not self.delay_s:
            self.switch, self.switch_process = hold("--net")
            self.on_switch("ip link add br0 type bridge", "ip link set br0 up")
        for i in range(self.number):
            self.boot(i)
        if self.delay_s:
            facts = [self.holders, self.addresses, self.delay_s, self.loss]
            self.switch_process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(facts)],
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=die_with_parent,
            )
            assert self.switch_process.stdout.readline(), "the network could not be created"
            for i in range(self.number):
                self.configure(i)
        return self

    def __exit__(self, *_):
        for i in range(self.number):
            self.kill(i)
        self.switch_process.kill()
        self.switch_process.wait()
        self.folder.cleanup()

    def on_switch(self, *commands):
        for command in commands:
            subprocess.run(
                ["nsenter", "-t", str(self.switch), "--net", *command.split()], check=True
            )

    def boot(self, i):
        """Create host i, or create it again after a kill."""
        script = f"mount --bind {self.table} /etc/hosts; exec sleep infinity"
        if self.shared_pids:
            self.holders[i], self.processes[i] = hold("--net", "--mount", script=script)
        else:
            self.holders[i], self.processes[i] = hold(
                "--net",
                "--uts",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                script=f"hostname {self.names[i]}; {script}",
            )
        if self.delay_s:
            return
        self.on_switch(
            f"ip link add p{i} type veth peer name {INTERFACE} netns {self.holders[i]}",
            f"ip link set p{i} master br0 up",
        )
        self.configure(i)

    def configure(self, i):
        """Give the interface of host i its address."""
        for command in (
            "ip link set lo up",
            f"ip address add {self.addresses[i]}/24 dev {INTERFACE}",
            f"ip link set {INTERFACE} up",
        ):
            self.run(i, command.split(), check=True)

    def environment(self):
        """Return the variables with which ranks find each other."""
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": self.addresses[0]}

    def facts(self, i):
        """Return what enter_host() needs to know of host i."""
        kinds = ["net", "mnt"] if self.shared_pids else ["net", "mnt", "uts", "pid"]
        return {"holder": self.holders[i], "kinds": kinds, "environment": self.environment()}

    def inside(self, i):
        """Return the words that run a command on host i."""
        words = ["nsenter", "-t", str(self.holders[i]), "--net", "--mount"]
        return words if self.shared_pids else [*words, "--uts", "--pid"]

    def run(self, i, command, **options):
        """Run a command on host i to its end."""
        return subprocess.run([*self.inside(i), *command], **options)

    def start(self, i, command, **options):
        """Start a command on host i."""
        return subprocess.Popen([*self.inside(i), *command], preexec_fn=die_with_parent, **options)

    def pids(self, i, *words):
        """Return the process ids on host i, as seen from here, whose command line has the words."""
        space, found = os.readlink(f"/proc/{self.holders[i]}/ns/net"), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if os.readlink(folder / "ns/net") == space and set(words) <= set(line):
                    found.append(int(folder.name))
        return sorted(found)

    def kill(self, i):
        """Kill every process of host i at once. Its kernel closes the connections."""
        if self.processes[i] is None:
            return
        for pid in self.pids(i) if self.shared_pids else [self.holders[i]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes[i].wait()
        self.processes[i] = None

    def cut(self, i):
        """Cut the link of host i: packets are lost without a word in both directions."""
        self.on_switch(f"bridge link set dev p{i} state 0")

    def mend(self, i):
        """Undo cut(i)."""
        self.on_switch(f"bridge link set dev p{i} state 3")

    def unplug(self, i):
        """Cut the link of host i so that both ends lose the carrier."""
        self.on_switch(f"ip link set p{i} down")

    def sent(self, i):
        """Return (bytes, packets) that host i has sent over its interface."""
        command = ["ip", "-s", "-j", "link", "show", INTERFACE]
        found = self.run(i, command, check=True, capture_output=True, text=True)
        counters = json.loads(found.stdout)[0]["stats64"]["tx"]
        return counters["bytes"], counters["packets"]


def set_namespace(path):
    """Move this process (or its children, for a PID namespace) into the namespace at a path."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as file:
        if libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"{path} cannot be entered")


def enter_host(facts):
    """Fork a process on a host, as os.fork() does. facts: Hosts.facts()."""
    folder = f"/proc/{facts['holder']}/ns"
    if "pid" in facts["kinds"]:
        set_namespace(f"{folder}/pid")
    pid = os.fork()
    if pid == 0:
        # The mount namespace last: afterwards /proc is that of the host.
        for kind in sorted(facts["kinds"], key="uts net mnt".find):
            if kind != "pid":
                set_namespace(f"{folder}/{kind}")
        os.environ.update(facts["environment"])
    return pid


def open_tunnel(holder):
    """Create the interface of a host, and return the file with its IP packets."""
    own = f"/proc/{os.getpid()}/ns/net"
    with open(own) as back:
        set_namespace(f"/proc/{holder}/ns/net")
        tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(tunnel, TUNSETIFF, request)
        ctypes.CDLL(None).setns(back.fileno(), 0)
    return tunnel


def impaired_network(holders, addresses, delay_s, loss):
    """Pass packets between hosts, each after delay_s, and lose a share of them."""
    tunnels = [open_tunnel(holder) for holder in holders]
    print("ready", flush=True)
    by_address = dict(zip(map(socket.inet_aton, addresses), tunnels, strict=True))
    rng, waiting = random.Random(0), collections.deque()
    while True:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for tunnel in select.select(tunnels, [], [], wait_s)[0]:
            packet = os.read(tunnel, 65536)
            # The destination of an IPv4 packet. Others, of IPv6, are of no interest.
            out = by_address.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if out is not None and rng.random() >= loss:
                waiting.append((time.monotonic() + delay_s, out, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, out, packet = waiting.popleft()
            with contextlib.suppress(OSError):
                os.write(out, packet)


if __name__ == "__main__":
    impaired_network(*json.loads(sys.argv[1]))
