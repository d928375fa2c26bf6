// Export: what the operator asks of it, and the ownership record, which most of that ends in.
#include <stdexcept>
#include <utility>

#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "proxy/export_impl.hpp"
#include "proxy/migration_id.hpp"

namespace nbdferry::proxy {

// --- the record ---

void ExportImpl::write_record(Ownership next, std::function<void(std::string)> done) {
  if (record_busy_) {
    done("the ownership record is being written already");
    return;
  }
  record_busy_ = true;
  boost::asio::post(helper_, [this, next = std::move(next), done = std::move(done)]() mutable {
    std::string error;
    try {
      record_.write(std::move(next));
    } catch (const std::exception& e) {
      error = e.what();
      // Not read again to see what it says: the page cache may show what is not on the disk. If
      // the new role is durable after all, the next start refuses I/O until `unfence`.
    }
    boost::asio::post(io_, [this, error, current = record_.current(), done = std::move(done)] {
      record_busy_ = false;
      if (error.empty()) ownership_ = current;
      done(error);
    });
  });
}

void ExportImpl::promote(CommandHandler done) {
  if (ownership_.role == Role::owner) {
    done(true, "");
    return;
  }
  if (ownership_.role != Role::incoming) {
    done(false,
         fmt::format("cannot promote: the disk is {}, not incoming", to_string(ownership_.role)));
    return;
  }
  Ownership next = ownership_;
  next.role = Role::owner;
  write_record(std::move(next), [this, done = std::move(done)](const std::string& error) {
    if (error.empty()) {
      incoming_claim_.clear();
      fence_migrations({});
    }
    done(error.empty(), error);
  });
}

void ExportImpl::unfence(CommandHandler done) {
  if (ownership_.role == Role::owner) {
    done(true, "");
    return;
  }
  if (engine_->status().serving == mirror::Serving::target) {
    done(false, "cannot unfence: the disk has been pivoted and its target serves");
    return;
  }
  Ownership next = ownership_;
  next.role = Role::owner;
  next.uris.clear();
  next.vias.clear();
  next.tls = {};
  write_record(std::move(next), [this, done = std::move(done)](const std::string& error) {
    if (!error.empty()) {
      done(false, error);
      return;
    }
    incoming_claim_.clear();
    fence_migrations({});
    post(mirror::Unfence{remember(done)});
  });
}

// --- operator ---

CommandId ExportImpl::remember(CommandHandler done) {
  const CommandId id{++last_command_};
  commands_.emplace(id, std::move(done));
  return id;
}

void ExportImpl::migrate(MigrateRequest request, CommandHandler done) {
  if (options_.read_only) {
    done(false, "cannot migrate: the disk is served read-only");
    return;
  }
  if (ownership_.role != Role::owner) {
    done(false, fmt::format("cannot migrate: the disk is {}", to_string(ownership_.role)));
    return;
  }
  const mirror::Status core = engine_->status();
  using mirror::Phase;
  const bool ended = core.phase == Phase::idle || core.phase == Phase::failed ||
                     core.phase == Phase::cancelled || core.phase == Phase::switched;
  const bool may_start = ended && core.serving == mirror::Serving::source;
  const bool go_on = may_start && goes_on(request);
  if (may_start) {
    try {
      // A malformed URI is found before anything starts.
      transport::TargetConfig trial;
      trial.uris = request.uris;
      trial.vias = request.vias;
      trial.tls = request.tls;
      (void)transport::Target::create(io_.get_executor(), std::move(trial), [](mirror::Event&&) {});
      if (!go_on) migration_id_ = new_migration_id(options_.disk);
    } catch (const std::exception& e) {
      done(false, e.what());
      return;
    }
    progress_ = 0;
    resuming_ = false;
    saved_.paused = saved_.incoming = false;
    start(std::move(request), std::move(done), go_on);
    return;
  }
  post(mirror::Start{remember(std::move(done)), request_.options, {}, false});
}

void ExportImpl::set(mirror::Set request, CommandHandler done) {
  request.command = remember(
      [this, changes = request, done = std::move(done)](bool ok, const std::string& message) {
        if (ok) remember_changes(changes);
        done(ok, message);
      });
  post(std::move(request));
}

void ExportImpl::command(Verb verb, CommandHandler done) {
  using mirror::SwitchKind;
  if (verb == Verb::promote) {
    promote(std::move(done));
    return;
  }
  if (verb == Verb::unfence) {
    unfence(std::move(done));
    return;
  }
  if (verb == Verb::abort) {
    done = [this, done = std::move(done)](bool ok, const std::string& message) {
      if (ok) remember_abort();
      done(ok, message);
    };
  }
  if (verb == Verb::pause || verb == Verb::resume) {
    done = [this, paused = verb == Verb::pause, done = std::move(done)](
               bool ok, const std::string& message) {
      if (ok) remember_pause(paused);
      done(ok, message);
    };
  }
  const CommandId id = remember(std::move(done));
  switch (verb) {
    case Verb::pause:
      post(mirror::Pause{id});
      break;
    case Verb::resume:
      post(mirror::Resume{id});
      break;
    case Verb::cancel:
      post(mirror::Cancel{id});
      break;
    case Verb::verify:
      post(mirror::Verify{id});
      break;
    case Verb::acknowledge:
      post(mirror::Verify{id, true});
      break;
    case Verb::prepare:
      post(mirror::Prepare{id});
      break;
    case Verb::seal:
      post(mirror::Seal{id});
      break;
    case Verb::commit_pivot:
      post(mirror::Commit{id, SwitchKind::pivot});
      break;
    case Verb::commit_release:
      post(mirror::Commit{id, SwitchKind::release});
      break;
    case Verb::switch_pivot:
      post(mirror::Switch{id, SwitchKind::pivot});
      break;
    case Verb::switch_release:
      post(mirror::Switch{id, SwitchKind::release});
      break;
    case Verb::abort:
      post(mirror::Abort{id});
      break;
    case Verb::promote:
    case Verb::unfence:
      break;
  }
}

}  // namespace nbdferry::proxy
