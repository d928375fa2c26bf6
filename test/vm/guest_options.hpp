// KEY=VALUE, from the kernel's command line or our own.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

#include "guest_report.hpp"

namespace guest {

inline void set_option(Options& options, std::string_view word) {
  static const std::map<std::string_view, std::uint64_t Options::*> numbers = {
      {"seed", &Options::seed},
      {"records", &Options::records},
      {"pause_us", &Options::pause_us},
      {"dirty_mib", &Options::dirty_mib}};
  const auto split = word.find('=');
  const auto key = word.substr(0, split);
  const std::string value(split == word.npos ? "" : word.substr(split + 1));
  if (key == "a") {
    options.a = value;
  } else if (key == "b") {
    options.b = value;
  } else if (const auto number = numbers.find(key); number != numbers.end()) {
    options.*number->second = std::stoull(value);
  } else {
    throw std::runtime_error("no such option: " + std::string(word));
  }
}

}  // namespace guest
