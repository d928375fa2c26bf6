// What the disk's and the record's tests stand on: temporary directories, loop devices and mounted
// file systems that vanish with the process, and a disk driven step by step.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include <boost/asio/io_context.hpp>

#include "proxy/local_disk.hpp"

namespace nbdferry::proxy::test {

class TempDir {
 public:
  explicit TempDir(const std::string& parent = "/tmp");
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::string operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// Detaches itself with the last descriptor, so also when a test aborts.
class LoopDevice {
 public:
  // Null (and a line that says why) where loop devices can't be had.
  static std::unique_ptr<LoopDevice> attach(const std::string& file);
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  UniqueFd device_;
  std::string path_;
};

// A file system of its own, in a mount namespace of this process.
class MountedFs {
 public:
  // `type`: ext4, xfs, btrfs (on a loop device), tmpfs. Null (and a line that says why) where
  // impossible.
  static std::unique_ptr<MountedFs> make(const std::string& type, std::uint64_t size);
  // As the machine would find it after a power failure now: what has reached the device, recovered
  // from the journal.
  [[nodiscard]] std::unique_ptr<MountedFs> after_power_failure() const;
  ~MountedFs();
  MountedFs(const MountedFs&) = delete;
  MountedFs& operator=(const MountedFs&) = delete;
  [[nodiscard]] std::string operator/(const std::string& name) const { return dir_ / name; }
  [[nodiscard]] std::string image() const { return image_dir_ / "fs.img"; }

 private:
  MountedFs() : image_dir_("/dev/shm") {}
  bool mount(const std::string& source, const std::string& data);
  TempDir image_dir_;
  TempDir dir_;
  std::unique_ptr<LoopDevice> loop_;
  std::string type_;
  bool mounted_ = false;
};

// A LocalDisk and its loop; answers are collected by id.
class DrivenDisk {
 public:
  explicit DrivenDisk(const LocalDiskOptions& options, bool allow_io_uring = true);

  // Submits; the answer, if it came at once, is already in `answers`.
  OpId submit(mirror::DiskOp op);
  // Runs the loop until the operation is answered.
  mirror::SourceDone finish(OpId id);
  mirror::SourceDone run(mirror::DiskOp op) { return finish(submit(std::move(op))); }

  mirror::SourceDone read(std::uint64_t begin, std::uint64_t end);
  mirror::SourceDone write(std::uint64_t begin, const std::string& data, bool fua = false);
  mirror::SourceDone trim(std::uint64_t begin, std::uint64_t end);
  mirror::SourceDone flush();

  boost::asio::io_context io{1};
  std::unique_ptr<LocalDisk> disk;
  std::map<OpId, mirror::SourceDone> answers;

 private:
  std::uint64_t next_id_ = 1;
  bool inside_submit_ = false;
};

void make_file(const std::string& path, std::uint64_t size);
[[nodiscard]] std::string file_contents(const std::string& path);
[[nodiscard]] std::string text(const mirror::SourceDone& done);
// The exit status of a shell command, its output discarded.
int shell(const std::string& command);
// what() of the std::runtime_error that `f` throws, or "" .
template <typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

}  // namespace nbdferry::proxy::test
