#!/usr/bin/env python3
"""The shape of the tree: who may include whom, and what lies at the top.

    mirror <- transport <- proxy, never back; mirror/ uses the standard library only, and of that
    nothing with a clock, a thread or randomness.

usage: layout.py ROOT       check ROOT; prints each breach, exit 1 if there is one
       layout.py --self-test  break each rule in a scratch tree, and see that it is noticed
"""
import pathlib
import re
import sys
import tempfile

MAY_INCLUDE = {
    "mirror": ("mirror",),
    "transport": ("mirror", "transport"),
    "proxy": ("mirror", "transport", "proxy"),
}
TOP_LEVEL = {"CMakeLists.txt", "LICENSE", "README.md", "docker", "mirror", "proxy", "scripts",
             "test", "transport"}

# C++20's headers, less those that would let time, threads or chance into the core.
STANDARD = set("""
algorithm any array barrier bit bitset cassert cctype cerrno cfenv cfloat charconv chrono cinttypes
climits clocale cmath compare complex concepts coroutine csetjmp csignal cstdarg cstddef cstdint
cstdio cstdlib cstring ctime cuchar cwchar cwctype deque exception execution filesystem format
forward_list fstream functional initializer_list iomanip ios iosfwd iostream istream iterator latch
limits list locale map memory memory_resource new numbers numeric optional ostream queue ranges ratio
regex scoped_allocator set source_location span sstream stack stdexcept streambuf string string_view
strstream system_error tuple type_traits typeindex typeinfo unordered_map unordered_set utility
valarray variant vector version""".split())
NOT_IN_THE_CORE = {"barrier", "latch", "csignal", "ctime", "execution", "filesystem", "fstream",
                   "coroutine"}

# What belongs to the server, or to the other side, of each folder that isn't allowed everything.
FOREIGN = {"transport": re.compile(r"^(liburing|CLI/|boost/(beast|json)|sys/epoll)")}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CLOCK_OR_CHANCE = re.compile(r"_clock\s*::|\bstd::(rand|time|clock|thread|mutex|atomic)\b")


def sources(folder):
    return sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".hpp", ".h"))


def breaches_of_file(folder, name, text):
    for quote, header in INCLUDE.findall(text):
        top = header.split("/")[0]
        if quote == '"' and top not in MAY_INCLUDE[folder]:
            yield f'{name}: may not include "{header}"'
        if quote == "<" and folder == "mirror" and header not in STANDARD - NOT_IN_THE_CORE:
            yield f"{name}: the core may not include <{header}>"
        if quote == "<" and folder in FOREIGN and FOREIGN[folder].match(header):
            yield f"{name}: may not include <{header}>"
    if folder == "mirror" and CLOCK_OR_CHANCE.search(text):
        yield f"{name}: the core has no clock, thread or randomness"


def breaches(root):
    for folder in MAY_INCLUDE:
        for path in sources(root / folder):
            yield from breaches_of_file(folder, path.relative_to(root), path.read_text())
    for entry in sorted(root.iterdir()):
        hidden_or_built = entry.name.startswith(".") or re.match(r"build(-|$)", entry.name)
        if entry.name not in TOP_LEVEL and not hidden_or_built:
            yield f"{entry.name}: not one of the agreed entries at the top level"
    for name in sorted(TOP_LEVEL - {"docker"}):
        if not (root / name).exists():
            yield f"{name}: missing at the top level"


def self_test():
    cases = [
        ("mirror/a.cpp", '#include "transport/target.hpp"\n'),
        ("mirror/a.cpp", '#include "proxy/export.hpp"\n'),
        ("mirror/a.cpp", "#include <boost/asio.hpp>\n"),
        ("mirror/a.cpp", "#include <unistd.h>\n"),
        ("mirror/a.cpp", "#include <thread>\n"),
        ("mirror/a.cpp", "#include <random>\n"),
        ("mirror/a.hpp", "auto t = std::chrono::steady_clock::now();\n"),
        ("transport/a.hpp", '#include "proxy/export.hpp"\n'),
        ("transport/a.cpp", "  #  include <liburing.h>\n"),
        ("transport/deep/a.cpp", '#include "../proxy/export.hpp"\n'),
        ("proxy/a.cpp", '#include "test/fake.hpp"\n'),
        ("notes.txt", "an entry that nobody agreed on\n"),
    ]
    good = {"mirror/ok.cpp": '#include <vector>\n#include "mirror/types.hpp"\n',
            "transport/ok.cpp": '#include <libnbd.h>\n#include "mirror/types.hpp"\n',
            "proxy/ok.cpp": '#include <liburing.h>\n#include "transport/target.hpp"\n'}
    for name, text in [(None, None)] + cases:
        with tempfile.TemporaryDirectory() as scratch:
            root = pathlib.Path(scratch)
            for entry in TOP_LEVEL:
                (root / entry).touch() if "." in entry else (root / entry).mkdir()
            files = dict(good) if name is None else {**good, name: text}
            for file, content in files.items():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_text(content)
            found = list(breaches(root))
            if (name is None) != (not found):
                sys.exit(f"self-test: {name}: {text!r} gave {found}")
    print(f"self-test: each of {len(cases)} breaches was noticed")


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    found = list(breaches(pathlib.Path(sys.argv[1])))
    print("\n".join(found) or "the layout is as agreed")
    sys.exit(1 if found else 0)


main()
