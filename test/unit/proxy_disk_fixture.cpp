#include "test/unit/proxy_disk_fixture.hpp"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include <fcntl.h>
#include <linux/loop.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>

#include <doctest/doctest.h>

namespace nbdferry::proxy::test {

namespace {

void skipped(const std::string& why) { MESSAGE("SKIPPED: ", why, ": ", std::strerror(errno)); }

// Mounts are seen by this process (and its children) only, and end with it.
bool own_mount_namespace() {
  static const bool ok = ::unshare(CLONE_NEWNS) == 0 &&
                         ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
  return ok;
}

}  // namespace

TempDir::TempDir(const std::string& parent) {
  std::string name = parent + "/nbdferry-test-XXXXXX";
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp: " + name);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::unique_ptr<LoopDevice> LoopDevice::attach(const std::string& file) {
  const UniqueFd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
  const UniqueFd backing(::open(file.c_str(), O_RDWR | O_CLOEXEC));
  // Another process may take the free device first: then ask for another one.
  for (int attempt = 0; control && backing && attempt < 16; ++attempt) {
    const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
    if (number < 0) break;
    auto loop = std::make_unique<LoopDevice>();
    loop->path_ = "/dev/loop" + std::to_string(number);
    loop->device_ = UniqueFd(::open(loop->path_.c_str(), O_RDWR | O_CLOEXEC));
    loop_config config{};
    config.fd = static_cast<std::uint32_t>(backing.get());
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
    if (loop->device_ && ::ioctl(loop->device_.get(), LOOP_CONFIGURE, &config) == 0) return loop;
    if (errno != EBUSY) break;
  }
  skipped("no loop device for " + file);
  return nullptr;
}

std::unique_ptr<MountedFs> MountedFs::make(const std::string& type, std::uint64_t size) {
  std::unique_ptr<MountedFs> fs(new MountedFs);
  fs->type_ = type;
  if (type == "tmpfs") {
    const std::string data = "size=" + std::to_string(size);
    return fs->mount("tmpfs", data) ? std::move(fs) : nullptr;
  }
  make_file(fs->image(), size);
  if (shell("mkfs." + type + " -q " + fs->image()) != 0) {
    skipped("mkfs." + type);
    return nullptr;
  }
  fs->loop_ = LoopDevice::attach(fs->image());
  return fs->loop_ && fs->mount(fs->loop_->path(), "") ? std::move(fs) : nullptr;
}

bool MountedFs::mount(const std::string& source, const std::string& data) {
  mounted_ = own_mount_namespace() &&
             ::mount(source.c_str(), dir_.path().c_str(), type_.c_str(), 0, data.c_str()) == 0;
  if (!mounted_) skipped("mount " + type_);
  return mounted_;
}

std::unique_ptr<MountedFs> MountedFs::after_power_failure() const {
  std::unique_ptr<MountedFs> fs(new MountedFs);
  fs->type_ = type_;
  if (shell("cp --sparse=always " + image() + " " + fs->image()) != 0) return nullptr;
  fs->loop_ = LoopDevice::attach(fs->image());
  return fs->loop_ && fs->mount(fs->loop_->path(), type_ == "xfs" ? "nouuid" : "") ? std::move(fs)
                                                                                   : nullptr;
}

MountedFs::~MountedFs() {
  if (mounted_) ::umount2(dir_.path().c_str(), MNT_DETACH);
}

DrivenDisk::DrivenDisk(const LocalDiskOptions& options, bool allow_io_uring) {
  disk = std::make_unique<LocalDisk>(
      io, probe_disk(options), options.read_only,
      [this](mirror::SourceDone&& done) {
        CHECK_FALSE(inside_submit_);
        const OpId id = done.id;
        CHECK(answers.emplace(id, std::move(done)).second);
      },
      allow_io_uring);
}

OpId DrivenDisk::submit(mirror::DiskOp op) {
  const OpId id{next_id_++};
  op.id = id;
  mirror::SourceDone done;
  inside_submit_ = true;
  const bool at_once = disk->submit(std::move(op), done);
  inside_submit_ = false;
  if (at_once) {
    CHECK(done.id == id);
    CHECK(answers.emplace(id, std::move(done)).second);
  }
  return id;
}

mirror::SourceDone DrivenDisk::finish(OpId id) {
  io.restart();
  while (!answers.contains(id)) REQUIRE(io.run_one_for(std::chrono::seconds(60)) == 1);
  auto node = answers.extract(id);
  return std::move(node.mapped());
}

mirror::SourceDone DrivenDisk::read(std::uint64_t begin, std::uint64_t end) {
  mirror::DiskOp op;
  op.range = {begin, end};
  return run(std::move(op));
}

mirror::SourceDone DrivenDisk::write(std::uint64_t begin, const std::string& data, bool fua) {
  mirror::DiskOp op;
  op.command = Command::write;
  op.range = {begin, begin + data.size()};
  op.payload = Payload::copy_of(std::as_bytes(std::span(data)));
  op.fua = fua;
  return run(std::move(op));
}

mirror::SourceDone DrivenDisk::trim(std::uint64_t begin, std::uint64_t end) {
  mirror::DiskOp op;
  op.command = Command::trim;
  op.range = {begin, end};
  return run(std::move(op));
}

mirror::SourceDone DrivenDisk::flush() {
  mirror::DiskOp op;
  op.command = Command::flush;
  return run(std::move(op));
}

void make_file(const std::string& path, std::uint64_t size) {
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) {
    throw std::runtime_error("can't make " + path);
  }
}

std::string file_contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string text(const mirror::SourceDone& done) {
  return {reinterpret_cast<const char*>(done.data.data()), done.data.size()};
}

int shell(const std::string& command) {
  return std::system(("( " + command + " ) </dev/null >/dev/null 2>&1").c_str());
}

}  // namespace nbdferry::proxy::test
