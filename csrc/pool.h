// A fork-join thread pool for jobs of microseconds.
//
// run() publishes a job of n items; awake workers and the caller claim items one by one, and the caller waits
// only for items somebody claimed. A worker the kernel has descheduled between jobs therefore delays nothing.
// Waiting spins briefly (the next job is usually microseconds away), then parks: giving the core up is what
// lets the kernel move a preempted worker onto it when another process holds the other core.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace prosparse {

class Pool {
  public:
    explicit Pool(int n_threads);
    ~Pool();
    Pool(const Pool&) = delete;

    int n_threads() const { return int(workers_.size()) + 1; }

    // fn(item, thread) for every item in [0, n_items); returns when all are done.
    template <class Fn>
    void run(int n_items, Fn&& fn) {
        run_job(
            n_items,
            [](void* ctx, int item, int thread) {
                (*static_cast<std::remove_reference_t<Fn>*>(ctx))(item, thread);
            },
            const_cast<void*>(static_cast<const void*>(&fn)));
    }

  private:
    using Call = void (*)(void* ctx, int item, int thread);
    void run_job(int n_items, Call call, void* ctx);
    void work(int thread);
    bool claim(int* item);
    void wake_all();

    // sequence << 40 | items << 20 | next item: one word, so a claim can never mix two jobs
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int> done_{0};
    Call call_ = nullptr;
    void* ctx_ = nullptr;
    int n_items_ = 0;

    std::atomic<int> parked_{0};
    std::atomic<bool> caller_parked_{false};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_, finished_;
    std::vector<std::thread> workers_;
};

}  // namespace prosparse
