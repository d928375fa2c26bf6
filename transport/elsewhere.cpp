#include "transport/elsewhere.hpp"

#include <algorithm>
#include <atomic>
#include <optional>
#include <thread>
#include <utility>

#include <boost/asio/post.hpp>
#include <boost/asio/prefer.hpp>
#include <boost/asio/thread_pool.hpp>

#include "mirror/assert.hpp"

namespace nbdferry::transport {

namespace {

constexpr unsigned threads_max = 4;

// Made when the first work comes; ends with the process.
boost::asio::thread_pool& helpers() {
  static boost::asio::thread_pool pool(std::min(threads_max, std::thread::hardware_concurrency()));
  return pool;
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

bool Elsewhere::exists() {
  static const bool more_than_one = std::thread::hardware_concurrency() > 1;
  return more_than_one;
}

void Elsewhere::start(std::function<void()> work, std::function<void()> back) {
  NBDFERRY_ASSERT(!is_busy(), "one piece of work at a time");
  recalled_ = false;
  job_ = std::make_shared<Job>();
  job_->work = std::move(work);
  job_->back = std::move(back);
  job_->executor = boost::asio::prefer(executor_, boost::asio::execution::outstanding_work.tracked);
  job_->unfinished = unfinished_;
  ++*unfinished_;
  boost::asio::post(helpers(), [this, job = job_] {
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
