// Dial: from an Endpoint to a connected socket with the options that rule 8 wants.
//
// Names are resolved off the caller's thread; every address is tried in turn, from the local address that
// the endpoint names. The handler is called once, from the executor, unless cancel() came first.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/ip/tcp.hpp>

#include "transport/uri.hpp"

namespace nbdferry::transport {

// What to do when nobody answers.
inline constexpr const char* check_address = "check the address, and that the server runs";

class Dial : public std::enable_shared_from_this<Dial> {
 public:
  // Either a connected, non-blocking descriptor, which the callee owns, or -1 and why.
  using Handler = std::function<void(int fd, const std::string& error)>;

  Dial(const boost::asio::any_io_executor& executor, Endpoint endpoint, Handler done);
  void start();
  void cancel();

 private:
  using Protocol = boost::asio::generic::stream_protocol;
  void try_address(std::size_t index);
  [[nodiscard]] bool bind(const Protocol::endpoint& to);
  void finish(int fd, const std::string& error);

  Endpoint endpoint_;
  Handler done_;
  boost::asio::ip::tcp::resolver resolver_;
  Protocol::socket socket_;
  std::vector<Protocol::endpoint> addresses_;
  std::string error_;  // of the last one tried
};

// Close without a reset: for a connection on which nothing is in flight, so that the polite DISC
// which was just sent isn't thrown away.
void let_linger(int fd);

}  // namespace nbdferry::transport
