// Elsewhere: a piece of work on one of the process's helper threads, one at a time, while its owner's thread
// goes on. What the work uses is its own until it is back, or was recalled.
#pragma once

#include <atomic>
#include <functional>
#include <memory>

#include <boost/asio/any_io_executor.hpp>

namespace nbdferry::transport {

class Elsewhere {
 public:
  // Is there a helper? With a single processor there is none: work elsewhere would only be later.
  [[nodiscard]] static bool exists();

  explicit Elsewhere(boost::asio::any_io_executor executor);
  ~Elsewhere() { recall(); }
  Elsewhere(const Elsewhere&) = delete;
  Elsewhere& operator=(const Elsewhere&) = delete;

  [[nodiscard]] bool is_busy() const { return job_ != nullptr; }
  // `work` must not throw, nor take long. Afterwards `back` is called from the executor.
  void start(std::function<void()> work, std::function<void()> back);
  // Work that has not begun never will, else this waits for its end; `back` is not called any more.
  void recall();
  // The work is to come to its end; asked from it.
  [[nodiscard]] bool is_recalled() const { return recalled_; }

 private:
  struct Job;
  boost::asio::any_io_executor executor_;
  std::shared_ptr<Job> job_;
  std::atomic<bool> recalled_ = false;
  std::shared_ptr<std::atomic<int>> unfinished_;  // pieces of work
};

}  // namespace nbdferry::transport
