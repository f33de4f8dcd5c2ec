#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace octavo {
namespace {

constexpr isize kPartsPerThread = 12;  // and fewer than 2^16 parts, whatever the machine
constexpr auto kSpin = std::chrono::microseconds(100);  // then a helper sleeps; the loops of a step follow closer

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

struct Pool {
    // The loop that runs: written by its owner while no part is open, read by who has claimed a part.
    Piece piece = nullptr;
    void* context = nullptr;
    isize count = 0, size = 0;
    uint32_t parts = 0;

    // Number of the loop << 32 | parts of the first half not yet claimed << 16 | of the second. Threads begin at different
    // halves and go upwards, so that each reads on where it was, as its prefetches suppose; who is done helps the other.
    std::atomic<uint64_t> ticket{0};
    std::atomic<uint32_t> open{0};    // parts not yet done
    std::atomic<int> sleepers{0};
    std::mutex owner, sleep;
    std::condition_variable wake;
    int wanted = 1, helpers = 0;

    // Claims and runs one part. A claim succeeds only for the loop whose number is in the ticket, and that loop cannot
    // end before the part is done, so what describes it stays as it is meanwhile.
    bool work(bool second) {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        while (uint32_t(seen)) {
            const uint32_t left[2] = {uint32_t(seen) >> 16, uint32_t(seen) & 0xffff};
            const bool half = left[second] ? second : !second;
            if (!ticket.compare_exchange_weak(seen, seen - (half ? 1 : 1 << 16), std::memory_order_acq_rel,
                                              std::memory_order_acquire))
                continue;
            const isize first = isize((half ? parts : parts / 2) - left[half]) * size;
            piece(context, first, first + size < count ? first + size : count);
            open.fetch_sub(1, std::memory_order_release);
            return true;
        }
        return false;
    }

    void help(bool second) {
        for (;;) {
            auto until = std::chrono::steady_clock::now() + kSpin;
            while (std::chrono::steady_clock::now() < until) {
                if (work(second)) until = std::chrono::steady_clock::now() + kSpin;
                for (int i = 0; i < 16; i++) pause();
            }
            std::unique_lock<std::mutex> lock(sleep);
            sleepers.fetch_add(1);
            wake.wait(lock, [this] { return uint32_t(ticket.load()) != 0; });
            sleepers.fetch_sub(1);
        }
    }

    void run(isize n, Piece p, void* c) {
        for (; helpers < wanted - 1; helpers++) std::thread(&Pool::help, this, helpers % 2 == 0).detach();
        const isize most = wanted * kPartsPerThread;
        piece = p, context = c, count = n, size = (n + most - 1) / most;
        parts = uint32_t((n + size - 1) / size);
        open.store(parts, std::memory_order_relaxed);
        const uint64_t number = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
        ticket.store(number << 32 | parts / 2 << 16 | (parts - parts / 2));
        if (sleepers.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep);
            wake.notify_all();
        }
        while (work(false)) {
        }
        // A helper that was taken off its core in the middle of a part needs one: give it ours after a while.
        for (int spins = 0; open.load(std::memory_order_acquire); spins++) spins < 1000 ? pause() : std::this_thread::yield();
    }
};

// Never destroyed: helpers may still wait in it when the process ends.
Pool& pool() {
    static Pool* instance = new Pool;
    return *instance;
}

// On large pages, where the system gives them to who asks.
void* allocate(std::size_t size) {
    constexpr std::size_t kLarge = 1 << 21;
    if (size < kLarge) return std::aligned_alloc(64, size);
    void* memory = std::aligned_alloc(kLarge, (size + kLarge - 1) / kLarge * kLarge);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (memory) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
}

}  // namespace

void share(isize count, Piece piece, void* context) {
    Pool& p = pool();
    std::unique_lock<std::mutex> mine(p.owner, std::try_to_lock);
    if (mine.owns_lock() && p.wanted > 1) p.run(count, piece, context);
    else piece(context, 0, count);
}

void set_threads(int count) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.owner);
    p.wanted = count > 1 ? count : 1;
}

int threads() { return pool().wanted; }

void* scratch(Scratch slot, std::size_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    struct Buffer {
        std::unique_ptr<void, Free> memory;
        std::size_t size = 0;
    };
    thread_local Buffer buffers[int(Scratch::count)];
    Buffer& b = buffers[int(slot)];
    if (bytes > b.size) {
        const std::size_t size = (bytes + 4095) / 4096 * 4096;
        b.memory.reset();
        b.size = 0;
        b.memory.reset(allocate(size));
        if (!b.memory) throw std::bad_alloc();
        b.size = size;
    }
    return b.memory.get();
}

}  // namespace octavo
