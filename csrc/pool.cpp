#include "pool.h"

#include <chrono>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prosparse {
namespace {

constexpr uint64_t kMask = (1u << 20) - 1;
int next_of(uint64_t t) { return int(t & kMask); }
int items_of(uint64_t t) { return int(t >> 20 & kMask); }

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Longer than any gap between two jobs of one token, shorter than a scheduler tick.
constexpr auto kWorkerSpin = std::chrono::microseconds(150);
// A claimed item is late by more than this only when its worker lost its core.
constexpr auto kCallerSpin = std::chrono::microseconds(60);

template <class Ready>
bool spin(std::chrono::microseconds limit, Ready ready) {
    for (int i = 0; i < 64; i++) {
        if (ready()) return true;
        pause();
    }
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

}  // namespace

Pool::Pool(int n_threads) {
    for (int t = 1; t < n_threads; t++) workers_.emplace_back([this, t] { work(t); });
}

Pool::~Pool() {
    stop_ = true;
    wake_all();
    for (auto& w : workers_) w.join();
}

void Pool::wake_all() {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
}

bool Pool::claim(int* item) {
    uint64_t t = ticket_.load(std::memory_order_acquire);
    if (next_of(t) >= items_of(t)) return false;
    t = ticket_.fetch_add(1, std::memory_order_acq_rel);
    *item = next_of(t);
    return next_of(t) < items_of(t);
}

void Pool::run_job(int n_items, Call call, void* ctx) {
    if (workers_.empty() || n_items <= 1) {
        for (int i = 0; i < n_items; i++) call(ctx, i, 0);
        return;
    }
    call_ = call;
    ctx_ = ctx;
    n_items_ = n_items;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t sequence = (ticket_.load(std::memory_order_relaxed) >> 40) + 1;
    ticket_.store(sequence << 40 | uint64_t(n_items) << 20);  // seq_cst: ordered before the look at parked_
    if (parked_.load() > 0) wake_all();

    int mine = 0;
    for (int item; claim(&item); mine++) call(ctx, item, 0);
    const auto all_done = [&] { return done_.load() + mine == n_items; };
    if (spin(kCallerSpin, all_done)) return;
    std::unique_lock lock(mutex_);
    caller_parked_ = true;
    finished_.wait(lock, all_done);
    caller_parked_ = false;
}

void Pool::work(int thread) {
    while (!stop_) {
        int item;
        if (claim(&item)) {
            call_(ctx_, item, thread);
            done_.fetch_add(1);
            if (caller_parked_.load()) {
                std::lock_guard lock(mutex_);
                finished_.notify_one();
            }
            continue;
        }
        const auto available = [&] {
            uint64_t t = ticket_.load();
            return stop_ || next_of(t) < items_of(t);
        };
        if (spin(kWorkerSpin, available)) continue;
        std::unique_lock lock(mutex_);
        parked_++;
        wake_.wait(lock, available);
        parked_--;
    }
}

}  // namespace prosparse
