// What tests of the control socket stand on: an export that only remembers what it was asked.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "proxy/export.hpp"

namespace nbdferry::proxy::test {

// Answers as it is told; remembers what it was asked. `held` commands are never answered.
class FakeExport : public Export {
 public:
  explicit FakeExport(std::string name) {
    info_.name = name;
    status_.name = std::move(name);
    status_.disk = "/disk";
    status_.role = "owner";
  }
  const ExportInfo& info() const override { return info_; }
  std::uint32_t attach(ReplySink&, const Migrant&) override { return 0; }
  void detach(std::uint32_t) override {}
  bool knows_migration(std::string_view) const override { return false; }
  bool holds_migration(std::string_view) const override { return false; }
  bool knows_session(std::string_view) const override { return false; }
  bool may_write(std::uint32_t) const override { return true; }
  void submit(mirror::GuestRequest&&) override {}
  void stop(std::function<void(std::string)> done) override { done({}); }
  ExportStatus status() const override { return status_; }
  void migrate(MigrateRequest request, CommandHandler done) override {
    requests.push_back(std::move(request));
    done(answer.first, answer.second);
  }
  void set(mirror::Set request, CommandHandler done) override {
    sets.push_back(std::move(request));
    done(answer.first, answer.second);
  }
  void command(Verb verb, CommandHandler done) override {
    verbs.push_back(verb);
    if (hold) {
      held = std::move(done);
    } else {
      done(answer.first, answer.second);
    }
  }

  std::pair<bool, std::string> answer{true, "well done"};
  std::vector<MigrateRequest> requests;
  std::vector<mirror::Set> sets;
  std::vector<Verb> verbs;
  std::atomic<bool> hold{false};
  CommandHandler held;
  ExportStatus status_;

 private:
  ExportInfo info_;
};

}  // namespace nbdferry::proxy::test
