// The load on disk A: records appended to files of a file system.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "guest_record.hpp"
#include "guest_report.hpp"

namespace guest {

class Files {
 public:
  /// Throws std::system_error when the directory can't be opened.
  explicit Files(const Options& options);
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;
  ~Files();

  /// The next record, and its sync where its plan has one. False after an error, which it has said.
  bool write_next();
  /// Everything synced and read back, all files closed.
  bool finish();

  Progress progress;

 private:
  bool begin_file(std::uint64_t lane, std::uint64_t number);
  bool end_file(std::uint64_t lane, std::uint64_t number);
  bool append(std::uint64_t record, int fd);
  bool sync(std::uint64_t record);
  bool check_file(std::uint64_t lane, std::uint64_t number, bool open);
  bool failed(const char* what, const std::string& name) const;

  int directory_ = -1;
  std::uint64_t seed_;
  std::uint64_t next_ = 1;
  std::array<int, lanes> open_;
  std::vector<std::byte> buffer_;
};

}  // namespace guest
