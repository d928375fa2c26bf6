// The border between the NBD server (sessions) and the export that they serve.
//
// A session owns its requests and numbers them; the export answers each exactly once through the
// session's ReplySink, unless the session has detached by then. All on the export's one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "mirror/events.hpp"

namespace nbdferry::proxy {

// What the handshake tells the guest (NBD protocol, "Transmission flags", NBD_INFO_BLOCK_SIZE).
struct ExportInfo {
  std::string name;  // "" is the default export; the session accepts "" for any name
  std::string description;
  std::uint64_t size = 0;  // bytes
  bool read_only = false;
  bool rotational = false;
  std::uint32_t block_min = 1;
  std::uint32_t block_preferred = 4096;
  std::uint32_t payload_max = 32 * 1024 * 1024;
};

// RequestId = session number << 32 | slot: the export finds the session, the session the request.
[[nodiscard]] constexpr RequestId make_request_id(std::uint32_t session, std::uint32_t slot) {
  return RequestId{(std::uint64_t{session} << 32) | slot};
}
[[nodiscard]] constexpr std::uint32_t session_of(RequestId id) {
  return static_cast<std::uint32_t>(static_cast<std::uint64_t>(id) >> 32);
}
[[nodiscard]] constexpr std::uint32_t slot_of(RequestId id) {
  return static_cast<std::uint32_t>(static_cast<std::uint64_t>(id));
}

class ReplySink {
 public:
  virtual ~ReplySink() = default;
  // May be called from inside Front::submit. Must not call Front::submit or detach synchronously.
  virtual void reply(mirror::Reply&& reply) = 0;
  // Drop the connection now, unparsed input included (a newer migration has replaced this one's).
  virtual void fence() = 0;
};

// A client that is a migration; an ordinary one has nothing of it.
struct Migrant {
  std::string_view migration;  // "x-nbdferry:migration=…"
  // "x-nbdferry:session=…": connections of one session live together, those of an older one are dead
  // when one of a newer session is served. Empty: it does not say.
  std::string_view session;
};

class Front {
 public:
  virtual ~Front() = default;
  [[nodiscard]] virtual const ExportInfo& info() const = 0;

  // `migrant`: the values of the private meta contexts that the client selected. Returns the session's
  // number.
  virtual std::uint32_t attach(ReplySink& sink, const Migrant& migrant) = 0;
  // Replies that come later are dropped.
  virtual void detach(std::uint32_t session) = 0;

  // Asked at SET_META_CONTEXT: is "x-nbdferry:migration=…" with this value acceptable here? (Only on
  // an --incoming disk; others don't know the context.)
  [[nodiscard]] virtual bool knows_migration(std::string_view migration) const = 0;

  // … and "x-nbdferry:holds=…": does this disk hold what that migration wrote and flushed, and nothing
  // that anybody wrote since?
  [[nodiscard]] virtual bool holds_migration(std::string_view migration) const = 0;

  // … and "x-nbdferry:knows=…": is a connection of this session of a migration open, on this disk? Sessions
  // are random: who knows one is whom the other connections go to.
  [[nodiscard]] virtual bool knows_session(std::string_view session) const = 0;

  // Rule 11: an incoming disk takes writes only from its migration. False: answer EPERM.
  [[nodiscard]] virtual bool may_write(std::uint32_t session) const = 0;

  // The request is valid (within the disk, flags known, not read-only): the session checked it.
  virtual void submit(mirror::GuestRequest&& request) = 0;
};

}  // namespace nbdferry::proxy
