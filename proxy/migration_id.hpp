// The name of a migration: "<source>.<migration>", both 32 hex digits. It travels in the private
// meta context "x-nbdferry:migration=…" and lets an --incoming disk tell its migration's writes
// from anybody else's (rule 11): the same source may start anew, another one may not interfere.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nbdferry::proxy {

// The source part is the same for the same file on the same machine, across restarts; the second
// part is random.
[[nodiscard]] std::string new_migration_id(const std::string& disk);

// The source part, or nothing if `id` is not of the form.
[[nodiscard]] std::optional<std::string_view> source_of(std::string_view id);

}  // namespace nbdferry::proxy
