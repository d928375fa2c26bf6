// Why was a server's certificate not accepted? GnuTLS knows, and libnbd doesn't say. So after such a failure
// the server is asked for it once more, and OpenSSL judges it by the same files, for the message alone:
// nothing is sent but the request for TLS, and nothing is trusted because of it.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>

#include "transport/dial.hpp"

namespace nbdferry::transport {

class CertificateCheck : public std::enable_shared_from_this<CertificateCheck> {
 public:
  using Handler = std::function<void(CertificateFault fault)>;

  // Of a TLS endpoint with certificates. Has no time limit of its own: the owner cancels it.
  CertificateCheck(const boost::asio::any_io_executor& executor, const Endpoint& endpoint,
                   Handler done);
  // The handler is called once, from the executor, unless cancel() came first.
  void start();
  void cancel();

 private:
  using Socket = boost::asio::generic::stream_protocol::socket;

  void on_dialled(int fd);
  void on_greeting();
  void on_reply();
  [[nodiscard]] CertificateFault verdict();
  void finish(CertificateFault fault);

  Endpoint endpoint_;
  Handler done_;
  std::shared_ptr<Dial> dial_;
  boost::asio::ssl::context context_;
  boost::asio::ssl::stream<Socket> stream_;
  std::array<unsigned char, 20> buffer_{};
};

}  // namespace nbdferry::transport
