#include "proxy/migration_id.hpp"

#include <algorithm>
#include <array>
#include <fstream>
#include <span>
#include <stdexcept>

#include <openssl/sha.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <fmt/format.h>

namespace nbdferry::proxy {

namespace {

constexpr std::size_t part_digits = 32;

std::string hex(std::span<const unsigned char> bytes) {
  std::string out;
  for (const unsigned char b : bytes) out += fmt::format("{:02x}", b);
  return out;
}

bool is_hex(std::string_view s) {
  return std::all_of(s.begin(), s.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

}  // namespace

std::string new_migration_id(const std::string& disk) {
  std::string machine;
  std::getline(std::ifstream("/etc/machine-id"), machine);
  struct stat st {};
  if (::stat(disk.c_str(), &st) != 0) throw std::runtime_error("cannot look at " + disk);
  const std::string identity =
      fmt::format("{}:{}:{}:{}", machine, st.st_dev, st.st_ino, st.st_rdev);
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest{};
  SHA256(reinterpret_cast<const unsigned char*>(identity.data()), identity.size(), digest.data());
  std::array<unsigned char, part_digits / 2> random{};
  if (::getrandom(random.data(), random.size(), 0) != static_cast<ssize_t>(random.size())) {
    throw std::runtime_error("the kernel gave no random numbers");
  }
  return hex(std::span(digest).first<part_digits / 2>()) + "." + hex(random);
}

std::optional<std::string_view> source_of(std::string_view id) {
  const bool ok = id.size() == 2 * part_digits + 1 && id[part_digits] == '.' &&
                  is_hex(id.substr(0, part_digits)) && is_hex(id.substr(part_digits + 1));
  return ok ? std::optional(id.substr(0, part_digits)) : std::nullopt;
}

}  // namespace nbdferry::proxy
