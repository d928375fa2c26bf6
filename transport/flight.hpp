// One operation on its way to the server and back, with all the memory that libnbd uses meanwhile.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transport/connection.hpp"

namespace nbdferry::transport {

struct Connection::Flight {
  Connection* connection = nullptr;  // for libnbd's callbacks
  mirror::DiskOp op;
  Buffer buffer;                         // read: filled by libnbd
  std::vector<Extent> extents;           // block status
  std::optional<std::uint32_t> sum_low;  // checksum
  std::optional<std::uint32_t> sum_high;
  std::uint64_t sequence = 0;
  std::uint64_t cost = 0;
  std::uint64_t sent_bytes = 0;
  Clock::time_point started;
  int error = 0;  // errno, once completed
  bool busy = false;

  void start(Connection& owner, mirror::DiskOp&& operation, std::uint64_t number,
             Clock::time_point now);
  void note_status(std::string_view context, const std::uint32_t* entries, std::size_t count);
  // Ends it, and lets go of its memory.
  Answer finish(IoError result, Clock::time_point now);
};

// The private meta context that tells an --incoming nbdferry whose migration this is (rule 11).
[[nodiscard]] std::string private_context(std::string_view name, const std::string& value);

// A BLOCK_STATUS with REQ_ONE has half of a checksum of the range as the flags of each of these. With
// other ones they say nothing.
inline constexpr const char* sum_low_context = "x-nbdferry:xxh3-low";
inline constexpr const char* sum_high_context = "x-nbdferry:xxh3-high";

}  // namespace nbdferry::transport
