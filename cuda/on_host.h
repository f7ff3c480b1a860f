// What page_copy.cu needs of CUDA, for a C++ compiler: one thread at a time, switched where threads meet.
//
// Every thread of a block is a fiber. It runs until it meets others (__syncthreads, __shfl_xor_sync), then the next one
// runs; a meeting is over when all who are to come have arrived. Blocks run one after the other, so `__shared__` is
// simply static. A thread that waits for a meeting that others never join is a bug of the kernel, and is reported.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define PDX_CONSTANT static const

struct uint4 {
    unsigned x, y, z, w;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    dim3() = default;
};

static dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace on_host {

constexpr std::size_t kStackBytes = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool finished = false;
    long barriers = 0, shuffles = 0;  // meetings that this thread has arrived at
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<unsigned long long> offered;  // by each thread to its warp, for two shuffles in turn
    ucontext_t scheduler;
    unsigned running = 0;
    std::function<void()> kernel;
};

inline Block*& current() {
    static Block* block = nullptr;
    return block;
}

inline void yield() {
    Block& block = *current();
    const unsigned me = block.running;
    swapcontext(&block.fibers[me].context, &block.scheduler);
    threadIdx = dim3(me, 0, 0);
}

// Turns until `met` or until nobody can move any more.
template <class Met>
inline void await(Met met) {
    for (long turns = 0; !met(); ++turns) {
        if (turns > 100000) {
            std::fprintf(stderr, "thread %u waits for threads that do not come\n", current()->running);
            std::abort();
        }
        yield();
    }
}

inline void run_fiber() {
    Block& block = *current();
    block.kernel();
    block.fibers[block.running].finished = true;
    swapcontext(&block.fibers[block.running].context, &block.scheduler);
}

// Runs one block of threads to its end.
inline void run_block(Block& block) {
    const unsigned threads = static_cast<unsigned>(block.fibers.size());
    for (Fiber& fiber : block.fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        fiber.finished = false;
        fiber.barriers = fiber.shuffles = 0;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned left = threads; left > 0;) {
        for (unsigned n = 0; n < threads; ++n) {
            if (block.fibers[n].finished) continue;
            block.running = n;
            threadIdx = dim3(n, 0, 0);
            swapcontext(&block.scheduler, &block.fibers[n].context);
            left -= block.fibers[n].finished;
        }
    }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> kernel) {
    Block block;
    block.fibers.resize(threads);
    block.offered.resize(2 * threads);
    block.kernel = std::move(kernel);
    gridDim = grid;
    blockDim = dim3(threads);
    current() = &block;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            run_block(block);
        }
    }
    current() = nullptr;
}

}  // namespace on_host

// Threads that have ended need not come: that is how Volta and later count.
inline void __syncthreads() {
    on_host::Block& block = *on_host::current();
    const long mine = ++block.fibers[block.running].barriers;
    on_host::await([&] {
        for (const on_host::Fiber& fiber : block.fibers) {
            if (!fiber.finished && fiber.barriers < mine) return false;
        }
        return true;
    });
}

inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int lanes) {
    on_host::Block& block = *on_host::current();
    const unsigned me = block.running, warp = me / 32 * 32;
    const long mine = ++block.fibers[me].shuffles;
    // Nobody is two shuffles ahead of a thread that it shuffles with, so two places for each are enough.
    block.offered[2 * me + mine % 2] = value;
    on_host::await([&] {
        for (unsigned lane = 0; lane < 32; ++lane) {
            if ((mask >> lane & 1) && block.fibers[warp + lane].shuffles < mine) return false;
        }
        return true;
    });
    return block.offered[2 * (warp + ((me % 32) ^ static_cast<unsigned>(lanes))) + mine % 2];
}

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }
