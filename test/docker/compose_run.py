#!/usr/bin/env python3
"""Runs docker/compose.yaml where there is no container engine: each service's command in
`buildah run --isolation chroot`, each service in a network namespace of its own, each network a
bridge. What is run is what the file and the images say; a key that this program does not know is an
error, so that nothing is shipped that is only thought to work.

As `docker compose up --exit-code-from operator` does: the first service to end ends all (SIGTERM),
and the operator's exit code counts. For root; scripts/docker-test.sh builds the images
before. Exit code 77: it can't be run here, and why.

Not covered, being the engine's: restart of an image's health check at its own interval, cap_drop and
read_only, name service (here: /etc/hosts), driver_opts (here: directories in /dev/shm).
"""
import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

COMPOSE_FILE = pathlib.Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"
LONGEST_S = 400
IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEYS = {
    "": {"x-nbdferry", "services", "networks", "volumes"},
    "service": {"image", "build", "command", "entrypoint", "environment", "volumes", "networks",
                "network_mode", "depends_on", "healthcheck", "cap_drop", "read_only"},
    "network": {"internal"},
    "volume": {"driver_opts"},
    "healthcheck": {"test", "interval", "timeout", "retries", "disable"},
}


def skip(why):
    print(f"SKIPPED, NOTHING WAS TESTED: {why}", file=sys.stderr)
    sys.exit(77)


def run(*command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True)


def known(kind, mapping):
    if unknown := set(mapping) - KEYS[kind]:
        raise ValueError(f"compose.yaml: {kind or 'top level'}: this test does not know {unknown}")


def words(value):
    return shlex.split(value) if isinstance(value, str) else list(value or [])


class Networks:
    """A namespace for each service, bridges in one more; the host's own network is left alone."""

    def __init__(self):
        self.prefix = f"ferry{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.bridges = {}
        self.made = []
        self.addresses = {}  # (service, network): address

    def __enter__(self):
        self.add_namespace(self.switch)
        return self

    def __exit__(self, *_):
        # A container's processes outlive the buildah that started them (and a fio without a server
        # eats memory without end). Whatever is in our namespaces is ours.
        for name in self.made:
            for pid in run("ip", "netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for name in self.made:
            run("ip", "netns", "del", name, check=False)

    def add_namespace(self, name):
        run("ip", "netns", "add", name)
        self.made.append(name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def namespace(self, service):
        return f"{self.prefix}-{service}"

    def add_network(self, name):
        number = len(self.bridges) + 1
        self.bridges[name] = number
        run("ip", "-n", self.switch, "link", "add", f"br{number}", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", f"br{number}", "up")

    def add_service(self, service, networks):
        namespace = self.namespace(service)
        self.add_namespace(namespace)
        for name in networks:
            number, host = self.bridges[name], len(self.addresses) + 2
            port = f"p{number}-{host}"
            run("ip", "-n", namespace, "link", "add", f"eth{number}", "type", "veth", "peer",
                "name", port, "netns", self.switch)
            run("ip", "-n", self.switch, "link", "set", port, "master", f"br{number}", "up")
            address = f"10.77.{number}.{host}"
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", f"eth{number}")
            run("ip", "-n", namespace, "link", "set", f"eth{number}", "up")
            self.addresses[service, name] = address

    def names_for(self, service):
        """NAME:ADDRESS of those, and only those, that are on a network with this service."""
        mine = {network for (name, network) in self.addresses if name == service}
        return [f"{name}:{address}" for (name, network), address in self.addresses.items()
                if network in mine]


class Service:
    def __init__(self, name, spec, networks, volumes):
        known("service", spec)
        self.name, self.spec = name, spec
        image = json.loads(run("buildah", "inspect", "--type", "image", spec["image"]).stdout)
        self.image = image["Docker"]["config"]
        names = [f"--add-host={entry}" for entry in networks.names_for(name)]
        self.container = run("buildah", "from", "--pull-never", *names,
                             spec["image"]).stdout.strip()
        self.options = []
        for volume in spec.get("volumes", []):
            source, target, *mode = volume.split(":")
            where = (COMPOSE_FILE.parent / source if source.startswith(".") else volumes[source])
            mode = "ro" if "ro" in ",".join(mode).split(",") else "rw"
            self.options += ["--volume", f"{where}:{target}:{mode}"]
        for key, value in spec.get("environment", {}).items():
            self.options += ["--env", f"{key}={value}"]
        self.namespace = networks.namespace(name)
        self.process = None
        # As in the specification: an entrypoint in the file voids the image's command too.
        entrypoint = spec.get("entrypoint", self.image.get("Entrypoint"))
        default = [] if "entrypoint" in spec else self.image.get("Cmd")
        self.command = words(entrypoint) + words(spec.get("command", default))

    def buildah(self, command):
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "buildah", "run", "--isolation",
                "chroot", *self.options, self.container, "--", *command]

    def start(self):
        print(f"-- {self.name}: {shlex.join(self.command)}", flush=True)
        self.process = subprocess.Popen(self.buildah(self.command), start_new_session=True)

    def wait_healthy(self):
        check = self.spec.get("healthcheck", {"test": self.image["Healthcheck"]["Test"]})
        known("healthcheck", check)
        if check["test"][0] != "CMD":
            raise ValueError(f"{self.name}: this test knows CMD health checks only")
        for _ in range(check.get("retries", 3)):
            # Not a second `buildah run`: its end takes the first one's files away.
            inside = ["nsenter", f"--target={self.main_pid()}", "--mount", "--root",
                      "--setuid=10001", "--setgid=10001", "--", "/usr/bin/env", "-i",
                      f"PATH={IMAGE_PATH}", *check["test"][1:]]
            done = run(*inside, check=False)
            if done.returncode == 0:
                return
            time.sleep(1)
        raise RuntimeError(f"{self.name} is not healthy: {done.stderr or done.stdout}")

    def main_pid(self):
        """The container's own process, among those that buildah started; 0: not there yet."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                name = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                if os.path.basename(name) == self.command[0]:
                    return pid
                # Of every thread: buildah's are many.
                for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
                    pids += [int(child) for child in children.read_text().split()]
        return 0

    def stop(self):
        if pid := self.main_pid():
            os.kill(pid, signal.SIGTERM)

    def remove(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        run("buildah", "rm", self.container, check=False)


def in_order(services):
    """Names, each after those it depends on."""
    done = []
    while len(done) < len(services):
        ready = [name for name, spec in services.items()
                 if name not in done and set(spec.get("depends_on", {})) <= set(done)]
        if not ready:
            raise ValueError("depends_on goes round in a circle")
        done += ready
    return done


def make_volumes(scratch, specs):
    volumes = {}
    for name, spec in specs.items():
        known("volume", spec)
        options = dict(pair.split("=") for pair in spec["driver_opts"]["o"].split(","))
        volumes[name] = pathlib.Path(scratch, name)
        volumes[name].mkdir()
        os.chown(volumes[name], int(options["uid"]), int(options["gid"]))
        volumes[name].chmod(int(options["mode"], 8))
    return volumes


def check_runs_as_nobody(service):
    uid = os.stat(f"/proc/{service.main_pid()}").st_uid
    assert uid == 10001, f"{service.name} runs as user {uid}"


def check_guest_is_apart(networks):
    """The guest must not reach the destination: else it could be served without the source."""
    address = networks.addresses["destination", "between-hosts"]
    probe = f"import socket; socket.create_connection(('{address}', 10809), 1)"
    for service, reaches in (("source", True), ("guest", False)):
        done = run("nsenter", f"--net=/run/netns/{networks.namespace(service)}", sys.executable,
                   "-c", probe, check=False)
        assert (done.returncode == 0) == reaches, f"{service} reaches destination: {not reaches}"


def run_all(services, order, networks):
    for name in order:
        for other, how in services[name].spec.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                services[other].wait_healthy()
        services[name].start()
    for name in ("source", "destination"):
        check_runs_as_nobody(services[name])
    check_guest_is_apart(networks)
    deadline = time.monotonic() + LONGEST_S
    while all(service.process.poll() is None for service in services.values()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not over after {LONGEST_S} s")
        time.sleep(0.1)
    # As an engine does: what depends on others ends before them.
    codes = {}
    for name in reversed(order):
        services[name].stop()
        codes[name] = services[name].process.wait(timeout=30)
    print(f"\n-- exit codes: {codes}")
    return 0 if set(codes.values()) == {0} else 1


def main():
    if os.geteuid() != 0:
        skip("namespaces need root")
    for program, package in (("buildah", "buildah"), ("ip", "iproute2"), ("nsenter", "util-linux")):
        if not shutil.which(program):
            skip(f"{program} is not installed (apt-get install {package})")
    try:
        import yaml
    except ImportError:
        skip("Python's yaml is not installed (apt-get install python3-yaml)")
    compose = yaml.safe_load(COMPOSE_FILE.read_text())
    known("", compose)
    for image in sorted({spec["image"] for spec in compose["services"].values()}):
        if run("buildah", "inspect", "--type", "image", image, check=False).returncode != 0:
            skip(f"no image {image}: scripts/docker-test.sh builds it")
    services = {}
    with tempfile.TemporaryDirectory(prefix="nbdferry-docker-", dir="/dev/shm") as scratch, \
            Networks() as networks:
        os.chmod(scratch, 0o755)
        volumes = make_volumes(scratch, compose["volumes"])
        for name, spec in compose["networks"].items():
            known("network", spec)
            networks.add_network(name)
        order = in_order(compose["services"])
        for name in order:
            networks.add_service(name, compose["services"][name].get("networks", []))
        try:
            for name in order:
                services[name] = Service(name, compose["services"][name], networks, volumes)
            return run_all(services, order, networks)
        finally:
            for service in services.values():
                service.remove()


if __name__ == "__main__":
    sys.exit(main())
