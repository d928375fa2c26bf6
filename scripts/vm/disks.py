"""A VM's disks as attach-vm.sh is told them, and the commands that make them appear in QEMU."""
import os
import re
import urllib.parse
from xml.sax.saxutils import quoteattr

from common import Usage

FORMATS = ("raw", "qcow2")
NBD_PORT = 10809


def in_uri(address):
    """IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def quoted(value):
    """A value within one of QEMU's comma-separated options."""
    return value.replace(",", ",,")


class Disk:
    """One --disk. What is served here has a file; what is served elsewhere has `served`, its URI."""

    def __init__(self, text, number, directory):
        self.name = f"disk{number}"
        self.number = number
        self.format, self.size, self.scratch = "raw", None, False
        self.file = self.served = None
        self.socket = os.path.join(directory, self.name + ".sock")
        self.control = os.path.join(directory, self.name + ".ctl")
        if re.match(r"nbd(\+unix)?://", text):
            self.served = text
        else:
            self._read_options(text)

    def _read_options(self, text):
        file, *options = text.split(",")
        if not file:
            raise Usage(f"--disk {text}: the file is missing")
        self.file = os.path.abspath(file)
        for option in options:
            key, _, value = option.partition("=")
            if key == "format" and value in FORMATS:
                self.format = value
            elif key == "size" and value:
                self.size = value
            elif option == "scratch=on":
                self.scratch = True
            else:
                raise Usage(f"--disk {text}: {option} is none of format=raw|qcow2, size=SIZE, "
                            "scratch=on")

    def serve_command(self, nbdferry, incoming_at):
        """incoming_at: HOST:PORT to take a migration at, or None."""
        command = [nbdferry, "serve", "--export", self.name, "--socket", self.socket,
                   "--control", self.control]
        if self.size:
            command += ["--create", self.size]
        if incoming_at and not self.scratch:
            command += ["--incoming", "--listen", incoming_at]
        return command + [self.file]

    def _server(self):
        """How QEMU reaches it."""
        if not self.served:
            return f"server.type=unix,server.path={quoted(self.socket)},export={self.name}"
        uri = urllib.parse.urlsplit(self.served)
        export = quoted(urllib.parse.unquote(uri.path.removeprefix("/")))
        if uri.scheme == "nbd+unix":
            path = urllib.parse.parse_qs(uri.query).get("socket")
            if not path:
                raise Usage(f"--disk {self.served}: not nbd+unix:///EXPORT?socket=PATH")
            return f"server.type=unix,server.path={quoted(path[0])},export={export}"
        if not uri.hostname:
            raise Usage(f"--disk {self.served}: not nbd://HOST:PORT/EXPORT")
        return (f"server.type=inet,server.host={uri.hostname},"
                f"server.port={uri.port or NBD_PORT},export={export}")

    def qemu_arguments(self, reconnect_delay):
        # cache.direct: no second cache above the server's. no-flush=off and write-cache=on: the
        # guest's flushes reach the server, which is what makes a write durable.
        cache = "cache.direct=on,cache.no-flush=off,discard=unmap"
        return [
            "-blockdev", f"driver=nbd,node-name={self.name}-nbd,{self._server()},"
                         f"reconnect-delay={reconnect_delay},{cache}",
            "-blockdev", f"driver={self.format},node-name={self.name},file={self.name}-nbd,{cache}",
            "-device", f"virtio-blk-pci,id={self.name}-device,drive={self.name},"
                       f"serial={self.name},discard=on,write-cache=on"]

    def libvirt_xml(self, reconnect_delay):
        if self.served:
            raise Usage(f"--print-libvirt: {self.served} is not served here")
        return (f"<disk type='network' device='disk'>\n"
                f"  <driver name='qemu' type='{self.format}' cache='none' discard='unmap'/>\n"
                f"  <source protocol='nbd' name='{self.name}'>\n"
                f"    <host transport='unix' socket={quoteattr(self.socket)}/>\n"
                f"    <reconnect delay='{reconnect_delay}'/>\n"
                f"  </source>\n"
                f"  <target dev='vd{chr(ord('a') + self.number)}' bus='virtio'/>\n"
                f"  <serial>{self.name}</serial>\n"
                f"</disk>")

    def describe(self, uri):
        """Its part of vm.json; uri: where a migration reaches it, or None."""
        what = {"name": self.name, "format": self.format, "scratch": self.scratch}
        if self.served:
            return {**what, "served": self.served}
        what |= {"file": self.file, "control": self.control}
        return {**what, "uri": uri} if uri and not self.scratch else what
