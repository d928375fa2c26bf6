"""TLS to the target: `tls.py CASE`. Certificates of real authorities (made here by openssl), qemu-nbd and nbdkit
as the servers."""
import contextlib
import os
import pathlib
import secrets
import shutil
import sys

import ferry
from ferry import MIB, check

SIZE = 32 * MIB
MARK = b"nobody but the target reads this"


class Authority:
    """One CA; a folder for each certificate that it signs, with the names that libnbd, QEMU and nbdkit want."""

    def __init__(self, scratch, name):
        self.path = pathlib.Path(scratch.file(name))
        self.path.mkdir()
        self.request("ca", "-x509", "-subj", f"/CN={name}", "-addext",
                     "keyUsage=critical,keyCertSign,cRLSign")

    def request(self, name, *options):
        key, out = self.path / f"{name}-key.pem", self.path / f"{name}-cert.pem"
        ferry.run_ok(["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                      "-nodes", "-keyout", key, "-out", out, *options])
        return key, out

    def sign(self, folder, kind, names, days=30):
        """kind: server or client. Negative days: it has expired."""
        there = self.path / folder
        there.mkdir()
        key, request = self.request(folder, "-subj", f"/CN={folder}")
        extensions = self.path / f"{folder}.ext"
        extensions.write_text(f"subjectAltName={names}\nkeyUsage=critical,digitalSignature\n"
                              f"extendedKeyUsage={kind}Auth\n")
        ferry.run_ok(["openssl", "x509", "-req", "-in", request, "-CA", self.path / "ca-cert.pem", "-CAkey",
                      self.path / "ca-key.pem", "-CAcreateserial", "-days", str(days), "-extfile",
                      extensions, "-out", there / f"{kind}-cert.pem"])
        shutil.copyfile(key, there / f"{kind}-key.pem")
        shutil.copyfile(self.path / "ca-cert.pem", there / "ca-cert.pem")
        return str(there)


def keys(scratch, name, *users):
    path = scratch.file(name)
    os.mkdir(path)  # QEMU wants a folder, with that name in it
    path += "/keys.psk"
    pathlib.Path(path).write_text("".join(f"{user}:{secrets.token_hex(32)}\n" for user in users))
    return path


def tcp(scratch, name, command):
    """Starts a server; its port."""
    port = ferry.free_port()
    scratch.start(name, [text.format(port=port) for text in command])
    ferry.wait_until(lambda: ferry.accepts(("127.0.0.1", port)), name)
    return port


def qemu(scratch, image, creds, name="target"):
    return tcp(scratch, name, ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "", "-b", "127.0.0.1", "-p",
                               "{port}", "--object", f"{creds},id=t,endpoint=server", "--tls-creds", "t",
                               image])


def nbdkit(scratch, name, *options):
    return tcp(scratch, name, ["nbdkit", "-f", "-i", "127.0.0.1", "-p", "{port}", *options, "memory",
                               str(SIZE)])


class Sniffer(ferry.Counted):
    """Remembers whether the mark passed in the clear."""

    def __init__(self, scratch, to, name):
        self.seen = False
        super().__init__(scratch, to, name)

    def pump(self, a, b):
        with contextlib.suppress(OSError):
            tail = b""
            while data := a.recv(256 * 1024):
                self.seen = self.seen or MARK in tail + data
                tail = data[-len(MARK):]
                with self.lock:
                    self.bytes += len(data)
                b.sendall(data)


def until_up(disk, count):
    ferry.wait_until(lambda: [p["state"] for p in disk.status()["paths"]] == ["up"] * count, "all paths")


def in_sync(disk):
    ferry.wait_until(lambda: disk.status()["in_sync"], "to be in sync", 60)


def move(scratch):
    """Certificates on both sides, two paths, a kill -9 in the middle, a pivot, another kill -9."""
    ours = Authority(scratch, "ours")
    there = ours.sign("there", "server", "IP:127.0.0.1")
    here = ours.sign("here", "client", "DNS:here")
    image = scratch.disk("source.img", SIZE)
    target = scratch.garbage("target.img", SIZE)
    uri = f"nbds://127.0.0.1:{qemu(scratch, target, f'tls-creds-x509,verify-peer=on,dir={there}')}/"
    with ferry.state_directory() as state:
        disk = ferry.Ferry(scratch, image, "--state", state)
        load = ferry.Load(scratch, disk.uri, image, "--rate", "100", "--bytes", "4096")
        disk.ok("migrate", "--tls", "require", "--tls-certificates", here, "--via", "127.0.0.2", "--via",
                "127.0.0.3", "--connections", "2", "--bandwidth", "12M", "--quarantine", "1s", uri)
        until_up(disk, 2)
        ferry.wait_until(lambda: disk.status()["copied_bytes"] > SIZE / 6, "half of its data")
        load.running()
        disk.process.kill()
        disk.process.wait()
        load.process.wait(timeout=20)

        disk = ferry.Ferry(scratch, image, "--state", state, name="resumed")
        check("resuming the migration" in scratch.log("resumed"), "it goes on")
        load = ferry.Load(scratch, disk.uri, image, "--rate", "400", name="load2")
        until_up(disk, 2)
        disk.ok("set", "--bandwidth", "0")
        in_sync(disk)
        disk.ok("verify")
        disk.ok("switch", "--pivot")
        load.running()
        load.end()
        disk.process.kill()
        disk.process.wait()
    # And by the ownership record alone, as after a reboot.
    with ferry.state_directory() as state:
        disk = ferry.Ferry(scratch, image, "--state", state, name="again")
        until_up(disk, 2)
        disk.stop()
    ferry.same(load.shadow, target, "the guest's view and the target")


def psk(scratch):
    """A shared key, one connection, many small requests in flight; nothing in the clear, no key anywhere."""
    image = scratch.file("source.img")
    with open(image, "wb") as f:
        f.write(MARK * (SIZE // len(MARK)))
    target = scratch.garbage("target.img", SIZE)
    file = keys(scratch, "keys", "alice", "bob")
    socket = scratch.file("nbdkit.sock")
    scratch.start("target", ["nbdkit", "-f", "-U", socket, "--tls=require", f"--tls-psk={file}", "file", target])
    ferry.wait_until(lambda: ferry.accepts(socket), "nbdkit")
    way = Sniffer(scratch, socket, "way")
    with ferry.state_directory() as state:
        disk = ferry.Ferry(scratch, image, "--state", state)
        load = ferry.Load(scratch, disk.uri, image, "--bytes", "512", "--depth", "128", "--rate", "2000")
        disk.ok("migrate", "--tls-psk", file, "--connections", "1", "--answer-timeout", "3s", "--switch",
                "pivot", "--wait", way.uri.replace("nbd+unix://", "nbds+unix://bob@"))
        # From here on its reads go there, too; and a reply that got stuck would end the connection.
        sent = disk.status()["paths"][0]["sent_bytes"]
        ferry.wait_until(lambda: disk.status()["paths"][0]["sent_bytes"] > sent + 2 * MIB, "4000 more writes")
        told = disk.ok("status", "--json")
        load.end()
        check(disk.status()["last_error"] is None, disk.status()["last_error"])
        check(" lost" not in scratch.log("ferry"), "the connection lasts")
        disk.stop()
        said = [told.encode(), scratch.log("ferry").encode(), pathlib.Path(image + ".owner").read_bytes()]
        said += [p.read_bytes() for p in pathlib.Path(state).rglob("*") if p.is_file()]
    for line in pathlib.Path(file).read_text().split():
        check(not any(line.split(":")[1].encode() in text for text in said), "a key was told")
    check(way.bytes > SIZE and not way.seen, f"{way.bytes} bytes, in the clear: {way.seen}")
    ferry.same(load.shadow, target, "the guest's view and the target")


def release(scratch):
    """To nbdkit, with the names in the URI; from a guest that uses the whole way at once."""
    ours = Authority(scratch, "ours")
    there = ours.sign("there", "server", "DNS:b.example")
    image = scratch.disk("source.img", SIZE)
    target = scratch.garbage("target.img", SIZE)
    port = tcp(scratch, "target", ["nbdkit", "-f", "-i", "127.0.0.1", "-p", "{port}", "--tls=require",
                                   f"--tls-certificates={there}", "file", target])
    disk = ferry.Ferry(scratch, image)
    load = ferry.Load(scratch, disk.uri, image, "--rate", "1000", "--until-shutdown")
    disk.ok("migrate", "--switch", "release", "--wait",
            f"nbds://localhost:{port}/?tls-certificates={ours.path}&tls-hostname=b.example")
    load.process.wait(timeout=20)
    disk.stop()
    ferry.same(image, target, "both sides")


def refused(scratch):
    """One line each that says what is wrong; and the clear is never a way out."""
    ours, others = Authority(scratch, "ours"), Authority(scratch, "others")
    here, alone = ours.sign("here", "client", "DNS:here"), str(ours.path)
    image = scratch.disk("source.img", SIZE)
    disk = ferry.Ferry(scratch, image)

    def fails(port, *options, because, uri="nbds://localhost:{}/"):
        disk.fails("migrate", *options, uri.format(port), because=because)

    def server(name, folder):
        return nbdkit(scratch, name, "--tls=require", f"--tls-certificates={folder}")

    with_ours = ("--tls-certificates", here)
    fails(server("stranger", others.sign("stranger", "server", "DNS:localhost")), *with_ours,
          because=["not signed by the CA in", f"{here}/ca-cert.pem"])
    wrong = server("wrong", ours.sign("wrong", "server", "DNS:b.example"))
    fails(wrong, *with_ours, because="certificate is not for 'localhost'")
    fails(wrong, *with_ours, because="certificate is not for '127.0.0.1'", uri="nbds://127.0.0.1:{}/")
    fails(server("late", ours.sign("late", "server", "DNS:localhost", days=-1)), *with_ours,
          because="has expired")
    strict = nbdkit(scratch, "strict", "--tls=require", "--tls-verify-peer",
                    "--tls-certificates=" + ours.sign("strict", "server", "DNS:localhost"))
    fails(strict, "--tls-certificates", alone, because="if it demands a client's certificate")
    fails(strict, "--tls-psk", keys(scratch, "some", "alice"), because="use --tls-certificates")
    fails(strict, because="demands TLS: use nbds", uri="nbd://localhost:{}/")

    file = keys(scratch, "keys", "alice", "bob")
    shared = nbdkit(scratch, "shared", "--tls=require", f"--tls-psk={file}")
    fails(shared, "--tls-psk", keys(scratch, "others-keys", "alice"), because="refused our key")
    fails(shared, *with_ours, because="ended the TLS handshake")
    fails(shared, "--tls-psk", file, because="holds 2 users")

    plain = nbdkit(scratch, "plain")
    fails(plain, *with_ours, because="does not offer TLS")
    fails(plain, "--tls-psk", file, because="does not offer TLS", uri="nbds://bob@localhost:{}/")
    fails(plain, "--tls", "require", because="--tls require forbids", uri="nbd://localhost:{}/")
    fails(plain, *with_ours, because="in the clear, and TLS is set up", uri="nbd://localhost:{}/")
    fails(plain, because="TLS needs credentials")
    fails(plain, "--tls-certificates", "/nowhere", because="cannot read '/nowhere/ca-cert.pem'")
    got = scratch.file("plain.img")
    ferry.run_ok(["nbdcopy", f"nbd://localhost:{plain}/", got])
    check(not any(pathlib.Path(got).read_bytes()), "nothing was written in the clear")

    # Unless the operator says so.
    disk.ok("migrate", *with_ours, "--tls-verify-peer", "off", "--switch", "release", "--wait",
            f"nbds://localhost:{wrong}/")
    disk.stop()


def main(case):
    with ferry.Scratch() as scratch:
        {f.__name__: f for f in (move, psk, release, refused)}[case](scratch)


if __name__ == "__main__":
    main(*sys.argv[1:])
