#include "mirror/types.hpp"

namespace nbdferry {

std::string_view to_string(IoError e) {
  switch (e) {
    case IoError::none:
      return "no error";
    case IoError::not_permitted:
      return "operation not permitted";
    case IoError::io:
      return "input/output error";
    case IoError::no_memory:
      return "out of memory";
    case IoError::invalid:
      return "invalid argument";
    case IoError::no_space:
      return "no space left";
    case IoError::overflow:
      return "value too large";
    case IoError::not_supported:
      return "not supported";
    case IoError::shutdown:
      return "server is shutting down";
    case IoError::lost:
      return "connection lost before the answer";
  }
  return "unknown error";
}

std::string_view to_string(Command c) {
  switch (c) {
    case Command::read:
      return "read";
    case Command::write:
      return "write";
    case Command::trim:
      return "trim";
    case Command::zero:
      return "zero";
    case Command::flush:
      return "flush";
    case Command::cache:
      return "cache";
    case Command::block_status:
      return "block status";
    case Command::checksum:
      return "checksum";
  }
  return "unknown command";
}

}  // namespace nbdferry
