// Sizes and times: what is accepted, what is refused, how numbers look to a person.
#include <chrono>

#include <doctest/doctest.h>

#include "proxy/units.hpp"

namespace nbdferry::proxy {

TEST_CASE("sizes take K M G T as powers of 1024") {
  CHECK(parse_size("0") == 0);
  CHECK(parse_size("4097") == 4097);
  CHECK(parse_size("1K") == 1024);
  CHECK(parse_size("3M") == 3ULL << 20);
  CHECK(parse_size("2G") == 2ULL << 30);
  CHECK(parse_size("16T") == 16ULL << 40);
  CHECK(parse_size("18446744073709551615") == 18446744073709551615ULL);
}

TEST_CASE("sizes that are malformed or too large are refused") {
  for (const char* text : {"", "K", "-1", "+1", " 1", "1 ", "1k", "1KB", "1.5G", "0x10", "1P",
                           "18446744073709551616", "16777216T", "99999999999T"}) {
    CAPTURE(text);
    CHECK_FALSE(parse_size(text));
  }
}

TEST_CASE("times need a unit, but for zero") {
  using namespace std::chrono_literals;
  CHECK(parse_time("0") == Duration{0});
  CHECK(parse_time("50ms") == Duration{50ms});
  CHECK(parse_time("2s") == Duration{2s});
  CHECK(parse_time("3min") == Duration{3min});
  for (const char* text : {"", "5", "s", "-1s", "1.5s", "1 s", "1m", "1h", "1sec", "1S",
                           "9223372037s", "99999999999999999999ms"}) {
    CAPTURE(text);
    CHECK_FALSE(parse_time(text));
  }
}

TEST_CASE("numbers are shown with about three digits") {
  CHECK(format_size(0) == "0 B");
  CHECK(format_size(999) == "999 B");
  CHECK(format_size(1000) == "1.0 KiB");
  CHECK(format_size(1536) == "1.5 KiB");
  CHECK(format_size(1ULL << 30) == "1.0 GiB");
  CHECK(format_size(500.0 * 1024 * 1024) == "500 MiB");
  CHECK(format_rate(112.0 * 1024 * 1024) == "112 MiB/s");
  CHECK(format_seconds(0) == "0.0 s");
  CHECK(format_seconds(4.24) == "4.2 s");
  CHECK(format_seconds(59.4) == "59 s");
  CHECK(format_seconds(59.6) == "1:00 min");
  CHECK(format_seconds(185) == "3:05 min");
  CHECK(format_seconds(7800) == "2:10:00 h");
}

}  // namespace nbdferry::proxy
