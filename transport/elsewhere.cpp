#include "transport/elsewhere.hpp"

#include <algorithm>
#include <atomic>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/prefer.hpp>

#include "mirror/assert.hpp"

namespace nbdferry::transport {

namespace {

constexpr unsigned threads_max = 4;

// As many as can be had: a guest is being served, and none is no reason to end.
class Helpers {
 public:
  Helpers() {
    const unsigned wanted = std::min(threads_max, std::thread::hardware_concurrency());
    if (wanted < 2) return;
    try {
      while (threads_.size() < wanted) threads_.emplace_back([this] { io_.run(); });
    } catch (const std::system_error&) {
      // Then fewer.
    }
  }
  ~Helpers() {
    io_.stop();
    for (auto& thread : threads_) thread.join();
  }
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  [[nodiscard]] bool any() const { return !threads_.empty(); }
  [[nodiscard]] boost::asio::io_context& io() { return io_; }

 private:
  boost::asio::io_context io_;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_{
      io_.get_executor()};
  std::vector<std::thread> threads_;
};

// Made when they are first asked for; end with the process.
Helpers& helpers() {
  static Helpers all;
  return all;
}

}  // namespace

struct Elsewhere::Job {
  std::function<void()> work;
  std::function<void()> back;
  std::atomic<bool> taken = false;  // by the helper that does it, or by who recalls it
  // Keeps the owner's loop running; and who counts the work as finished has let go of it.
  std::optional<boost::asio::any_io_executor> executor;
  std::shared_ptr<std::atomic<int>> unfinished;

  void finish() {
    executor.reset();
    --*unfinished;
    unfinished->notify_all();
  }
};

Elsewhere::Elsewhere(boost::asio::any_io_executor executor)
    : executor_(std::move(executor)), unfinished_(std::make_shared<std::atomic<int>>(0)) {}

bool Elsewhere::exists() { return helpers().any(); }

void Elsewhere::start(std::function<void()> work, std::function<void()> back) {
  NBDFERRY_ASSERT(!is_busy(), "one piece of work at a time");
  recalled_ = false;
  job_ = std::make_shared<Job>();
  job_->work = std::move(work);
  job_->back = std::move(back);
  job_->executor = boost::asio::prefer(executor_, boost::asio::execution::outstanding_work.tracked);
  job_->unfinished = unfinished_;
  ++*unfinished_;
  boost::asio::post(helpers().io(), [this, job = job_] {
    if (job->taken.exchange(true)) return;
    job->work();
    boost::asio::post(*job->executor, [this, job] {
      // Recalled in the meantime: it has none, and we may be no more.
      const auto and_then = std::exchange(job->back, {});
      if (!and_then) return;
      job_.reset();
      and_then();
    });
    job->finish();
  });
}

// Waits for those, too, that are back already: a helper may not have left the loop yet, which may go with us.
void Elsewhere::recall() {
  recalled_ = true;
  if (const auto job = std::exchange(job_, nullptr)) {
    job->back = {};
    if (!job->taken.exchange(true)) job->finish();
  }
  for (int left = *unfinished_; left != 0; left = *unfinished_) unfinished_->wait(left);
}

}  // namespace nbdferry::transport
