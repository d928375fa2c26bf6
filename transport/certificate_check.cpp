// NBD protocol, "Newstyle negotiation" and "STARTTLS"; then a TLS handshake that is dropped.
#include "transport/certificate_check.hpp"

#include <algorithm>
#include <string_view>

#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/buffer.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>

namespace nbdferry::transport {

namespace {

using namespace std::string_view_literals;

constexpr std::size_t greeting_bytes = 18;  // NBDMAGIC, IHAVEOPT, flags
constexpr std::size_t reply_bytes = 20;     // magic, option, type, length
constexpr std::string_view greeting = "NBDMAGICIHAVEOPT"sv;
// Our flags (fixed newstyle), then the option STARTTLS without data.
constexpr std::string_view request = "\0\0\0\1IHAVEOPT\0\0\0\5\0\0\0\0"sv;
constexpr std::size_t type_at = 12;
constexpr std::string_view acknowledged = "\0\0\0\1"sv;

CertificateFault fault_of(long result) {
  switch (result) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return CertificateFault::expired;
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return CertificateFault::not_yet_valid;
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
      return CertificateFault::other_name;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
      return CertificateFault::unknown_signer;
    default:
      return CertificateFault::unknown;
  }
}

}  // namespace

CertificateCheck::CertificateCheck(const boost::asio::any_io_executor& executor,
                                   const Endpoint& endpoint, Handler done)
    : endpoint_(endpoint),
      done_(std::move(done)),
      context_(boost::asio::ssl::context::tls_client),
      stream_(Socket(executor), context_) {}

void CertificateCheck::start() {
  dial_ = std::make_shared<Dial>(stream_.get_executor(), endpoint_,
                                 [self = shared_from_this()](int fd, const std::string&) {
                                   self->dial_.reset();
                                   self->on_dialled(fd);
                                 });
  dial_->start();
}

void CertificateCheck::on_dialled(int fd) {
  const int family = endpoint_.is_unix() ? AF_UNIX : AF_INET;  // for Asio's books alone
  boost::system::error_code error;
  if (fd >= 0) {
    stream_.next_layer().assign(boost::asio::generic::stream_protocol(family, 0), fd, error);
    if (error) ::close(fd);
  }
  if (fd < 0 || error) {
    finish(CertificateFault::unknown);
    return;
  }
  boost::asio::async_read(
      stream_.next_layer(), boost::asio::buffer(buffer_.data(), greeting_bytes),
      [self = shared_from_this()](boost::system::error_code failed, std::size_t) {
        if (failed) {
          self->finish(CertificateFault::unknown);
        } else {
          self->on_greeting();
        }
      });
}

void CertificateCheck::on_greeting() {
  if (!std::equal(greeting.begin(), greeting.end(), buffer_.begin())) {
    finish(CertificateFault::unknown);
    return;
  }
  boost::asio::async_write(
      stream_.next_layer(), boost::asio::buffer(request),
      [self = shared_from_this()](boost::system::error_code failed, std::size_t) {
        if (failed) {
          self->finish(CertificateFault::unknown);
          return;
        }
        boost::asio::async_read(self->stream_.next_layer(),
                                boost::asio::buffer(self->buffer_.data(), reply_bytes),
                                [self](boost::system::error_code error, std::size_t) {
                                  if (error) {
                                    self->finish(CertificateFault::unknown);
                                  } else {
                                    self->on_reply();
                                  }
                                });
      });
}

void CertificateCheck::on_reply() {
  if (!std::equal(acknowledged.begin(), acknowledged.end(), buffer_.begin() + type_at)) {
    finish(CertificateFault::unknown);
    return;
  }
  boost::system::error_code error;
  context_.load_verify_file(endpoint_.tls->certificates + "/ca-cert.pem", error);
  auto* const wanted = SSL_get0_param(stream_.native_handle());
  // As GnuTLS does: what is in the file is trusted, be it a root or not.
  X509_VERIFY_PARAM_set_flags(wanted, X509_V_FLAG_PARTIAL_CHAIN);
  const auto& name = endpoint_.tls->hostname;
  if (X509_VERIFY_PARAM_set1_ip_asc(wanted, name.c_str()) != 1) {
    X509_VERIFY_PARAM_set1_host(wanted, name.data(), name.size());
  }
  // Judged, yet not broken off: a server that wants our certificate may do that.
  stream_.set_verify_mode(boost::asio::ssl::verify_none, error);
  stream_.async_handshake(boost::asio::ssl::stream_base::client,
                          [self = shared_from_this()](const boost::system::error_code&) {
                            self->finish(self->verdict());
                          });
}

CertificateFault CertificateCheck::verdict() {
  return fault_of(SSL_get_verify_result(stream_.native_handle()));
}

void CertificateCheck::finish(CertificateFault fault) {
  const auto done = std::exchange(done_, nullptr);
  boost::system::error_code ignored;
  stream_.next_layer().close(ignored);
  if (done) done(fault);
}

void CertificateCheck::cancel() {
  done_ = nullptr;
  if (dial_) dial_->cancel();
  dial_.reset();
  boost::system::error_code ignored;
  stream_.next_layer().close(ignored);
}

}  // namespace nbdferry::transport
