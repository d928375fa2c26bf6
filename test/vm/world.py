"""A real guest on the first of two hosts, for the scenes of a test."""
import os
import sys

import guest
from hosts import ferry, two_hosts

MIB = 1024 * 1024


class World:
    """The guest has two disks (guest.make_disks). Of `more` each is one word more about every disk's
    --disk; `extra` are the sizes of further scratch disks, which the guest does not touch."""

    def __init__(self, scratch, hosts, more="", extra=(), prepare=None, **guest_options):
        self.scratch = scratch
        self.here, self.there = hosts
        self.more, self.extra, self.guest_options = more, extra, guest_options
        self.boot = guest.build(os.environ["GUEST_CACHE"], os.environ["GUEST_WRITER"])
        disks = guest.make_disks(scratch.file(""))
        for number, image in enumerate((disks.a, disks.b)):
            os.rename(image, self.here.disk(number))
            if prepare:
                prepare(self.here.disk(number))
        self.console = guest.Console(seed=disks.seed)
        self.lives = 0
        self.start()
        self.console.wait_up()
        self.goes_on()

    def start(self):
        self.here.attach(self.disks(self.here), self.qemu())

    def disks(self, host):
        """What --disk says there. Sizes are those of the disks here; files that exist are kept."""
        sizes = [os.path.getsize(self.here.disk(number)) // MIB for number in (0, 1)]
        return [f"{host.disk(n)},size={size}M{self.more}" for n, size in enumerate(sizes)] + \
            [f"{host.disk(2 + n)},size={size},scratch=on" for n, size in enumerate(self.extra)]

    def qemu(self, device=True):
        self.lives += 1
        path = self.scratch.file(f"console{self.lives}")
        more = ["-device", "virtio-rng-pci"] if device else []
        return [*guest.qemu_arguments(self.boot, self.console.listen(path), **self.guest_options),
                *more]

    def wait_there(self, **qemu):
        """The other host waits for the guest."""
        self.there.attach(self.disks(self.there), self.qemu(**qemu), incoming=True)

    def arrived(self):
        """It has moved: what was there is here now."""
        self.here.wait_end()
        self.here, self.there = self.there, self.here
        self.goes_on()

    def goes_on(self):
        self.console.wait_progress(records=20)

    def stop(self):
        """The guest ends by itself; returns its disks."""
        self.console.stop()
        self.here.wait_end()
        self.there.stop()
        return self.here.disk(0), self.here.disk(1)

    def end(self):
        guest.check_disks(*self.stop(), self.console)


def play(*scenes):
    """Runs the scenes (or those that the command line names) one after another, with one guest; what
    it wrote is checked at the end."""
    def all_of_them(scratch, hosts):
        world = World(scratch, hosts)
        for scene in chosen(scenes):
            scene(world)
        world.end()
    on_two_hosts(all_of_them)


def chosen(scenes):
    for scene in scenes:
        if not sys.argv[1:] or scene.__name__ in sys.argv[1:]:
            print("---", scene.__name__, flush=True)
            yield scene


def on_two_hosts(do):
    """do(scratch, hosts); where the guest can't be had the test is skipped."""
    if os.geteuid() != 0:
        guest.skip("network namespaces need root")
    try:
        with two_hosts() as (scratch, hosts):
            do(scratch, hosts)
    except guest.Unavailable as why:
        guest.skip(str(why))
