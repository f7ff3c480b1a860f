// Pages of a KV cache <-> one slab, side by side, with an xxh3-64 digest of each: gather, scatter, or only look.
//
//   cache    per layer: block b is `page_bytes` bytes at base + b * stride_bytes (any stride: other layers, or the
//            other half of a hybrid block, may lie between)
//   slab     page (layer l, position i) at slab + (l * count + i) * pitch_bytes
//   block    ids by position, the same for all layers of a launch. A negative id is a hole: nothing is read or
//   ids      written for it, and its digest is 0. Gather may name a block twice, scatter may not.
//   digests  page (l, i) at l * count + i: xxh3-64 with seed 0, exactly what engines on CPUs write into slot headers
//
// This file holds, in this order: constants, the kernels, the reference (plain C++, which NVRTC does not see), the
// launcher that checks what it is given, and a self-test followed by timings. It is compiled in three ways, always the
// same text:
//
//   NVRTC     the kernels alone, at an engine's start (pdx/engine/kernels.py)
//   nvcc      nvcc -O3 -std=c++17 -arch=sm_90 -DPDX_SELF_TEST cuda/page_copy.cu -o page_copy && ./page_copy
//   a host    g++ -O2 -std=c++17 -include cuda/on_host.h -x c++ cuda/page_copy.cu: threads are played one by one, so
//   compiler  that tests without a GPU run the kernel's own statements (tests/cuda)
//
// Theory of the digest. xxh3 of a long input (over 240 bytes) cuts it in blocks of 1,024 bytes. Inside a block, its
// eight accumulators only ever *add* products of input and secret, so a warp can compute a block's sums in any order;
// between blocks the accumulators are scrambled, one block after the other. So a team of warps copies a page, each warp
// whole blocks, and leaves the sums in shared memory, where one more warp chains them while the team is ahead with the
// next blocks, of this page or of the next one.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// ---- constants ------------------------------------------------------------------------------------------------------

constexpr int kBlockBytes = 1024;   // of xxh3, and what one warp copies at a time
constexpr int kStripeBytes = 64;
constexpr int kAccumulators = 8;
constexpr int kDigestBytesMin = 241;  // shorter inputs have other formulas, and no page is so small
constexpr int kPageBytesMax = 1 << 30;
constexpr int kCopyWarps = 8;         // of a block of threads without digest
constexpr int kSmallTeam = 4, kLargeTeam = 16;  // warps that copy a page with digest; see `large_team`
constexpr int kWaves = 4;
constexpr int kSmallResident = 8, kLargeResident = 2;  // blocks of threads on a processor at once

constexpr u64 kPrime32_1 = 0x9E3779B1ull, kPrime32_2 = 0x85EBCA77ull, kPrime32_3 = 0xC2B2AE3Dull;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87ull, kPrime64_2 = 0xC2B2AE3D27D4EB4Full;
constexpr u64 kPrime64_3 = 0x165667B19E3779F9ull, kPrime64_4 = 0x85EBCA77C2B2AE63ull;
constexpr u64 kPrime64_5 = 0x27D4EB2F165667C5ull;
constexpr u64 kAvalanche = 0x165667919E3779F9ull;

#ifndef PDX_CONSTANT
#define PDX_CONSTANT __constant__
#endif

// xxh3's default secret as little-endian words, and what it reads of it at offsets that are no multiples of eight.
PDX_CONSTANT u64 kSecret[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

// The secret's eight bytes at any offset.
__device__ inline u64 secret_at(int offset) {
    const int word = offset >> 3, shift = (offset & 7) * 8;
    return shift == 0 ? kSecret[word] : kSecret[word] >> shift | kSecret[word + 1] << (64 - shift);
}

__device__ inline u64 initial(int accumulator) {
    switch (accumulator) {
        case 0: return kPrime32_3;
        case 1: return kPrime64_1;
        case 2: return kPrime64_2;
        case 3: return kPrime64_3;
        case 4: return kPrime64_4;
        case 5: return kPrime32_2;
        case 6: return kPrime64_5;
        default: return kPrime32_1;
    }
}

// One layer of an engine's cache, as the table in device memory holds it.
struct Layer {
    u8* base;
    i64 stride_bytes;
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// What is done with a page: block -> slab, slab -> block, or only its digest.
enum class Mode { kGather, kScatter, kLook };

struct Chunk {
    u64 low, high;  // 16 bytes, little-endian
};

// kWide: all addresses are multiples of 16. Nothing is read or written twice, so caches are told not to keep it.
template <bool kWide>
__device__ inline Chunk load_chunk(const u8* from) {
    Chunk chunk;
    if constexpr (kWide) {
        const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
        chunk.low = static_cast<u64>(words.y) << 32 | words.x;
        chunk.high = static_cast<u64>(words.w) << 32 | words.z;
    } else {
        chunk.low = chunk.high = 0;
        for (int n = 0; n < 8; ++n) {
            chunk.low |= static_cast<u64>(from[n]) << 8 * n;
            chunk.high |= static_cast<u64>(from[8 + n]) << 8 * n;
        }
    }
    return chunk;
}

template <bool kWide>
__device__ inline void store_chunk(u8* to, Chunk chunk) {
    if constexpr (kWide) {
        uint4 words;
        words.x = static_cast<u32>(chunk.low);
        words.y = static_cast<u32>(chunk.low >> 32);
        words.z = static_cast<u32>(chunk.high);
        words.w = static_cast<u32>(chunk.high >> 32);
        __stcs(reinterpret_cast<uint4*>(to), words);
    } else {
        for (int n = 0; n < 8; ++n) {
            to[n] = static_cast<u8>(chunk.low >> 8 * n);
            to[8 + n] = static_cast<u8>(chunk.high >> 8 * n);
        }
    }
}

// A lane's two chunks of a block: at 16 * lane, and 512 bytes behind. Zero where the page has ended.
struct Pair {
    Chunk near, far;
};

// Copies a block, or what the page has left of it (`bytes`), by one warp. Without kStore, only reads it.
template <bool kStore, bool kWide>
__device__ inline Pair copy_block(u8* to, const u8* from, u32 bytes, u32 lane) {
    const u32 near = lane * 16, far = 512 + lane * 16;
    Pair pair = {};
    if (bytes == kBlockBytes) {
        pair.near = load_chunk<kWide>(from + near);
        pair.far = load_chunk<kWide>(from + far);
        if (kStore) store_chunk<kWide>(to + near, pair.near);
        if (kStore) store_chunk<kWide>(to + far, pair.far);
        return pair;
    }
    if (near + 16 <= bytes) pair.near = load_chunk<kWide>(from + near);
    if (far + 16 <= bytes) pair.far = load_chunk<kWide>(from + far);
    if (kStore && near + 16 <= bytes) store_chunk<kWide>(to + near, pair.near);
    if (kStore && far + 16 <= bytes) store_chunk<kWide>(to + far, pair.far);
    const u32 tail = (bytes & ~15u) + lane;  // fewer than 16 bytes
    if (kStore && tail < bytes) to[tail] = from[tail];
    return pair;
}

struct PageAt {
    u8* to;
    const u8* from;
};

template <Mode kMode>
__device__ inline PageAt locate(const Layer* layers, i64 layer, i64 block_id, u8* slab, i64 number, i64 pitch_bytes) {
    u8* const cached = layers[layer].base + block_id * layers[layer].stride_bytes;
    if (kMode == Mode::kLook) return {nullptr, cached};
    u8* const packed = slab + number * pitch_bytes;
    return kMode == Mode::kScatter ? PageAt{cached, packed} : PageAt{packed, cached};
}

// Without digest, each warp copies one block of one page. grid: (blocks of all positions / kCopyWarps, layers).
template <Mode kMode, bool kWide>
__device__ inline void move_block(const Layer* layers, i64, const int* block_ids, i64 count, u8* slab, i64 page_bytes,
                                  i64 pitch_bytes, u64*) {
    const u32 bytes = static_cast<u32>(page_bytes), blocks = (bytes + kBlockBytes - 1) / kBlockBytes;
    const u64 item = static_cast<u64>(blockIdx.x) * kCopyWarps + threadIdx.x / 32;
    const u64 position = item / blocks;
    if (position >= static_cast<u64>(count)) return;
    const int block_id = block_ids[position];
    if (block_id < 0) return;
    const PageAt page = locate<kMode>(layers, blockIdx.y, block_id, slab, blockIdx.y * count + position, pitch_bytes);
    const u32 start = static_cast<u32>(item - position * blocks) * kBlockBytes;
    const u32 left = bytes - start, length = left < kBlockBytes ? left : kBlockBytes;
    copy_block<true, kWide>(page.to + start, page.from + start, length, threadIdx.x % 32);
}

__device__ inline u64 product(u64 keyed) { return (keyed & 0xffffffffull) * (keyed >> 32); }

// What 16 bytes add to their two accumulators: each also takes its neighbour's input.
__device__ inline void accumulate(u64& even, u64& odd, Chunk chunk, u64 key_even, u64 key_odd) {
    even += product(chunk.low ^ key_even) + chunk.high;
    odd += product(chunk.high ^ key_odd) + chunk.low;
}

// Lanes with the same (lane & 3) hold parts of the same two accumulators: an even one and the odd one after it. In the
// end, lane n of the first eight has all of accumulator `accumulator_of(n)`: lanes 0-3 the even ones, 4-7 the odd ones.
__device__ inline u64 add_up(u64 even, u64 odd, u32 lane) {
    const bool keeps_odd = lane & 4;
    u64 kept = keeps_odd ? odd : even;
    kept += __shfl_xor_sync(0xffffffffu, keeps_odd ? even : odd, 4);
    kept += __shfl_xor_sync(0xffffffffu, kept, 8);
    return kept + __shfl_xor_sync(0xffffffffu, kept, 16);
}

__device__ inline u32 accumulator_of(u32 lane) { return 2 * (lane & 3) + (lane >> 2 & 1); }

// The last stripe, which may overlap the one before, and the mixing of eight accumulators into one number. Lanes 0-7.
__device__ inline u64 finish_digest(u64 sum, const u8* page, u32 page_bytes, u32 lane) {
    const u32 offset = accumulator_of(lane) * 8;
    const u8* last = page + page_bytes - kStripeBytes + offset;
    u64 input = 0;
    for (int n = 0; n < 8; ++n) input |= static_cast<u64>(last[n]) << 8 * n;
    sum += product(input ^ secret_at(121 + offset));
    sum += __shfl_xor_sync(0xffu, input, 4);
    const u64 mine = sum ^ secret_at(11 + offset), other = __shfl_xor_sync(0xffu, mine, 4);
    u64 mixed = (mine * other) ^ __umul64hi(mine, other);  // both lanes of a pair hold it
    mixed += __shfl_xor_sync(0xffu, mixed, 1);
    mixed += __shfl_xor_sync(0xffu, mixed, 2);
    mixed += page_bytes * kPrime64_1;
    mixed = (mixed ^ mixed >> 37) * kAvalanche;
    return mixed ^ mixed >> 32;
}

// With digest, kTeam warps copy a page together, and one more chains their sums. Each block of threads moves pages
// grid.x apart. In a round every warp of the team copies at most kRound / kTeam blocks.
template <Mode kMode, bool kWide, int kTeam>
__device__ inline void move_pages_of(const Layer* layers, i64 layer_count, const int* block_ids, i64 count, u8* slab,
                                     i64 page_bytes, i64 pitch_bytes, u64* digests) {
    constexpr u32 kRound = 4 * kTeam;
    __shared__ u64 sums[2][kRound][kAccumulators];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 bytes = static_cast<u32>(page_bytes), blocks = (bytes + kBlockBytes - 1) / kBlockBytes;
    const u32 scrambled = (bytes - 1) / kBlockBytes;  // those that another one follows: all but the last
    // A lane's chunks are of stripes lane / 4 and 8 + lane / 4, and there of accumulators 2 * (lane & 3) and the next.
    const u32 stripe = lane >> 2, word = stripe + 2 * (lane & 3), accumulator = accumulator_of(lane);
    const u64 near_even = kSecret[word], near_odd = kSecret[word + 1];
    const u64 far_even = kSecret[word + 8], far_odd = kSecret[word + 9];
    const u64 scramble = kSecret[16 + accumulator];
    u32 half = 0;
    for (i64 number = blockIdx.x; number < layer_count * count; number += gridDim.x) {
        const int block_id = block_ids[number % count];
        if (block_id < 0) {
            if (threadIdx.x == 0) digests[number] = 0;
            continue;
        }
        const PageAt page = locate<kMode>(layers, number / count, block_id, slab, number, pitch_bytes);
        u64 sum = initial(accumulator);
        for (u32 first = 0; first < blocks; first += kRound, half ^= 1) {
            const u32 end = first + kRound < blocks ? first + kRound : blocks;
            for (u32 block = first + warp; warp < kTeam && block < end; block += kTeam) {
                const u32 start = block * kBlockBytes, left = bytes - start;
                const Pair pair = copy_block<kMode != Mode::kLook, kWide>(
                    page.to + start, page.from + start, left < kBlockBytes ? left : kBlockBytes, lane);
                const u32 stripes = block < scrambled ? 16 : (left - 1) / kStripeBytes;
                u64 even = 0, odd = 0;
                if (stripe < stripes) accumulate(even, odd, pair.near, near_even, near_odd);
                if (stripe + 8 < stripes) accumulate(even, odd, pair.far, far_even, far_odd);
                const u64 total = add_up(even, odd, lane);
                if (lane < kAccumulators) sums[half][block - first][lane] = total;
            }
            __syncthreads();  // this round's sums are there, and those of the round before have been chained
            if (warp == kTeam && lane < kAccumulators) {
#pragma unroll 4
                for (u32 block = first; block < end; ++block) {
                    sum += sums[half][block - first][lane];
                    if (block < scrambled) sum = (sum ^ sum >> 47 ^ scramble) * kPrime32_1;
                }
            }
        }
        if (warp == kTeam && lane < kAccumulators) {
            const u64 digest = finish_digest(sum, page.from, bytes, lane);
            if (lane == 0) digests[number] = digest;
        }
    }
}

#define PDX_PARAMETERS                                                                                                \
    const Layer *layers, i64 layer_count, const int *block_ids, i64 count, u8 *slab, i64 page_bytes, i64 pitch_bytes, \
        u64 *digests

#define PDX_PLAIN(name, mode, wide)                                                                            \
    extern "C" __global__ void __launch_bounds__(kCopyWarps * 32) name(PDX_PARAMETERS) {                       \
        move_block<mode, wide>(layers, layer_count, block_ids, count, slab, page_bytes, pitch_bytes, digests); \
    }

#define PDX_DIGEST(name, mode, wide, team, resident)                                                   \
    extern "C" __global__ void __launch_bounds__((team + 1) * 32, resident) name(PDX_PARAMETERS) {     \
        move_pages_of<mode, wide, team>(                                                               \
            layers, layer_count, block_ids, count, slab, page_bytes, pitch_bytes, digests);            \
    }

// `_bytes`: for addresses that are no multiples of 16. `_large`: by large teams.
#define PDX_KERNELS(name, mode)                                                   \
    PDX_PLAIN(name, mode, true)                                                   \
    PDX_PLAIN(name##_bytes, mode, false)                                          \
    PDX_LOOK(name##_digest, mode)

#define PDX_LOOK(name, mode)                                                      \
    PDX_DIGEST(name, mode, true, kSmallTeam, kSmallResident)                      \
    PDX_DIGEST(name##_large, mode, true, kLargeTeam, kLargeResident)              \
    PDX_DIGEST(name##_bytes, mode, false, kSmallTeam, kSmallResident)             \
    PDX_DIGEST(name##_bytes_large, mode, false, kLargeTeam, kLargeResident)

PDX_KERNELS(pdx_gather, Mode::kGather)
PDX_KERNELS(pdx_scatter, Mode::kScatter)
PDX_LOOK(pdx_look_digest, Mode::kLook)

#ifndef __CUDACC_RTC__

// ---- reference ------------------------------------------------------------------------------------------------------

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace reference {

// Plain xxh3-64 of a long input, as its specification tells it: one accumulator after the other. It shares nothing with
// the kernels, the secret included, so that no slip can be in both.
inline u64 word_at(const u8* at) {
    u64 word;
    std::memcpy(&word, at, 8);
    return word;
}

inline void stripe(u64* sums, const u8* input, const u8* secret) {
    for (int n = 0; n < kAccumulators; ++n) {
        const u64 data = word_at(input + 8 * n), keyed = data ^ word_at(secret + 8 * n);
        sums[n ^ 1] += data;
        sums[n] += (keyed & 0xffffffffull) * (keyed >> 32);
    }
}

inline u64 xxh3(const u8* input, i64 bytes) {
    static const u64 words[24] = {
        0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
        0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
        0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
        0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
        0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
        0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
    };
    const u8* secret = reinterpret_cast<const u8*>(words);
    u64 sums[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    const i64 blocks = (bytes - 1) / kBlockBytes;
    for (i64 block = 0; block < blocks; ++block) {
        for (int n = 0; n < 16; ++n) stripe(sums, input + block * kBlockBytes + n * kStripeBytes, secret + 8 * n);
        for (int n = 0; n < 8; ++n) sums[n] = (sums[n] ^ sums[n] >> 47 ^ word_at(secret + 128 + 8 * n)) * kPrime32_1;
    }
    const u8* rest = input + blocks * kBlockBytes;
    for (i64 n = 0; n < (bytes - 1 - blocks * kBlockBytes) / kStripeBytes; ++n) {
        stripe(sums, rest + n * kStripeBytes, secret + 8 * n);
    }
    stripe(sums, input + bytes - kStripeBytes, secret + 121);
    u64 mixed = static_cast<u64>(bytes) * kPrime64_1;
    for (int n = 0; n < 8; n += 2) {
        const unsigned __int128 wide = static_cast<unsigned __int128>(sums[n] ^ word_at(secret + 11 + 8 * n)) *
                                       (sums[n + 1] ^ word_at(secret + 19 + 8 * n));
        mixed += static_cast<u64>(wide) ^ static_cast<u64>(wide >> 64);
    }
    mixed = (mixed ^ mixed >> 37) * kAvalanche;
    return mixed ^ mixed >> 32;
}

// The whole operation, page by page. Host memory.
inline void move_pages(Mode mode, const Layer* layers, int layer_count, const int* block_ids, int count, u8* slab,
                       i64 page_bytes, i64 pitch_bytes, u64* digests) {
    for (int l = 0; l < layer_count; ++l) {
        for (int i = 0; i < count; ++i) {
            const i64 number = static_cast<i64>(l) * count + i;
            if (digests) digests[number] = 0;
            if (block_ids[i] < 0) continue;
            u8* cached = layers[l].base + block_ids[i] * layers[l].stride_bytes;
            u8* packed = slab + number * pitch_bytes;
            if (mode == Mode::kGather) std::memcpy(packed, cached, page_bytes);
            if (mode == Mode::kScatter) std::memcpy(cached, packed, page_bytes);
            if (digests) digests[number] = xxh3(cached, page_bytes);
        }
    }
}

}  // namespace reference

// ---- launcher -------------------------------------------------------------------------------------------------------

// What is wrong with these arguments, or null. `layers` and `block_ids` are the host's copies of what the device holds.
extern "C" const char* pdx_page_copy_fault(Mode mode, const Layer* layers, int layer_count, const int* block_ids,
                                           int count, int num_blocks, const u8* slab, i64 page_bytes, i64 pitch_bytes,
                                           const u64* digests) {
    if (mode < Mode::kGather || mode > Mode::kLook) return "no such mode";
    if (layer_count < 1 || layer_count > 65535) return "between 1 and 65,535 layers can be moved at once";
    if (count < 0 || num_blocks < 1) return "a negative count, or a cache without blocks";
    if (page_bytes < 1 || page_bytes > kPageBytesMax) return "a page has between 1 and 2^30 bytes";
    if (mode != Mode::kLook && pitch_bytes < page_bytes) return "pages overlap in the slab";
    if (mode == Mode::kLook && digests == nullptr) return "nothing to do";
    if (digests != nullptr && page_bytes < kDigestBytesMin) return "pages of 240 bytes or less have no digest here";
    if (mode != Mode::kLook && count > 0 && slab == nullptr) return "no slab";
    for (int l = 0; l < layer_count; ++l) {
        if (layers[l].base == nullptr) return "a layer without memory";
        if (num_blocks > 1 && layers[l].stride_bytes < page_bytes) return "pages overlap in the cache";
    }
    std::vector<bool> seen(mode == Mode::kScatter ? num_blocks : 0);
    for (int i = 0; i < count; ++i) {
        if (block_ids[i] >= num_blocks) return "a block id outside the cache";
        if (mode != Mode::kScatter || block_ids[i] < 0) continue;
        if (seen[block_ids[i]]) return "two pages would be scattered into one block";
        seen[block_ids[i]] = true;
    }
    return nullptr;
}

// Whether 16 bytes can be moved at a time.
inline bool wide(const Layer* layers, int layer_count, const u8* slab, i64 pitch_bytes) {
    u64 bits = reinterpret_cast<uintptr_t>(slab) | static_cast<u64>(pitch_bytes);
    for (int l = 0; l < layer_count; ++l) {
        bits |= reinterpret_cast<uintptr_t>(layers[l].base) | static_cast<u64>(layers[l].stride_bytes);
    }
    return bits % 16 == 0;
}

typedef void (*Kernel)(PDX_PARAMETERS);

struct Launch {
    Kernel kernel;
    dim3 grid;
    u32 threads;
};

// Sixteen warps for a page where fewer pages are moved than blocks of threads fit: then one page's time is all of it.
inline bool large_team(i64 pages, int processors) { return pages < static_cast<i64>(kSmallResident) * processors; }

// More blocks of threads than fit at once, so that none waits for the slowest; not one a page, for beginning one costs.
inline Launch plan(Mode mode, bool is_wide, bool digest, int layer_count, int count, i64 page_bytes, int processors) {
    static const Kernel plain[2][2] = {{pdx_gather, pdx_gather_bytes}, {pdx_scatter, pdx_scatter_bytes}};
    static const Kernel digests[3][2][2] = {
        {{pdx_gather_digest, pdx_gather_digest_large}, {pdx_gather_digest_bytes, pdx_gather_digest_bytes_large}},
        {{pdx_scatter_digest, pdx_scatter_digest_large}, {pdx_scatter_digest_bytes, pdx_scatter_digest_bytes_large}},
        {{pdx_look_digest, pdx_look_digest_large}, {pdx_look_digest_bytes, pdx_look_digest_bytes_large}},
    };
    const i64 pages = static_cast<i64>(layer_count) * count, blocks = (page_bytes + kBlockBytes - 1) / kBlockBytes;
    const int row = static_cast<int>(mode);
    if (!digest) {
        const u32 across = static_cast<u32>((count * blocks + kCopyWarps - 1) / kCopyWarps);
        return {plain[row][!is_wide], dim3(across, layer_count), kCopyWarps * 32};
    }
    const bool large = large_team(pages, processors);
    const i64 most = static_cast<i64>(processors) * (large ? kLargeResident : kSmallResident) * kWaves;
    const u32 across = static_cast<u32>(pages < most ? pages : most);
    return {digests[row][!is_wide][large], dim3(across), static_cast<u32>((large ? kLargeTeam : kSmallTeam) + 1) * 32};
}

#ifdef __CUDACC__

inline void enqueue(const Launch& launch, cudaStream_t stream, PDX_PARAMETERS) {
    launch.kernel<<<launch.grid, launch.threads, 0, stream>>>(
        layers, layer_count, block_ids, count, slab, page_bytes, pitch_bytes, digests);
}

// Enqueues one launch. `device_*` are where the device finds what the host's copies say. Null, or what is wrong.
inline const char* move_pages(Mode mode, const Layer* layers, const Layer* device_layers, int layer_count,
                              const int* block_ids, const int* device_block_ids, int count, int num_blocks, u8* slab,
                              i64 page_bytes, i64 pitch_bytes, u64* digests, int processors, cudaStream_t stream) {
    const char* fault = pdx_page_copy_fault(
        mode, layers, layer_count, block_ids, count, num_blocks, slab, page_bytes, pitch_bytes, digests);
    if (fault || count == 0) return fault;
    const bool is_wide = wide(layers, layer_count, slab, pitch_bytes);
    enqueue(plan(mode, is_wide, digests != nullptr, layer_count, count, page_bytes, processors), stream,
            device_layers, layer_count, device_block_ids, count, slab, page_bytes, pitch_bytes, digests);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

// The same on the host, thread by thread (see on_host.h). `processors`: how many to pretend.
extern "C" const char* pdx_move_pages(Mode mode, const Layer* layers, int layer_count, const int* block_ids, int count,
                                      int num_blocks, u8* slab, i64 page_bytes, i64 pitch_bytes, u64* digests,
                                      int processors) {
    const char* fault = pdx_page_copy_fault(
        mode, layers, layer_count, block_ids, count, num_blocks, slab, page_bytes, pitch_bytes, digests);
    if (fault || count == 0) return fault;
    const bool is_wide = wide(layers, layer_count, slab, pitch_bytes);
    const Launch launch = plan(mode, is_wide, digests != nullptr, layer_count, count, page_bytes, processors);
    on_host::launch(launch.grid, launch.threads, [&] {
        launch.kernel(layers, layer_count, block_ids, count, slab, page_bytes, pitch_bytes, digests);
    });
    return nullptr;
}

// What `plan` chooses, for those who choose elsewhere: grid.x, grid.y, threads.
extern "C" void pdx_plan(Mode mode, int digest, int layer_count, int count, i64 page_bytes, int processors,
                         u32* chosen) {
    const Launch launch = plan(mode, true, digest != 0, layer_count, count, page_bytes, processors);
    chosen[0] = launch.grid.x;
    chosen[1] = launch.grid.y;
    chosen[2] = launch.threads;
}

extern "C" void pdx_move_pages_reference(Mode mode, const Layer* layers, int layer_count, const int* block_ids,
                                         int count, u8* slab, i64 page_bytes, i64 pitch_bytes, u64* digests) {
    reference::move_pages(mode, layers, layer_count, block_ids, count, slab, page_bytes, pitch_bytes, digests);
}

#endif

// ---- self-test, then timings ----------------------------------------------------------------------------------------

#if defined(PDX_SELF_TEST) && defined(__CUDACC__)

#include <algorithm>
#include <cstdlib>
#include <random>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        const cudaError_t error = (call);                                                            \
        if (error != cudaSuccess) {                                                                  \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error));      \
            std::exit(2);                                                                            \
        }                                                                                            \
    } while (0)

struct Case {
    int layers, num_blocks, count;
    i64 page_bytes, stride_extra, pitch_extra, offset;  // offset: of all memory from a multiple of 16
};

template <class T>
struct OnDevice {
    T* at = nullptr;
    explicit OnDevice(size_t count) { CHECK(cudaMalloc(&at, std::max<size_t>(1, count) * sizeof(T))); }
    ~OnDevice() { cudaFree(at); }
    void put(const std::vector<T>& from) {
        CHECK(cudaMemcpy(at, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> take(size_t count) const {
        std::vector<T> to(count);
        CHECK(cudaMemcpy(to.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost));
        return to;
    }
};

// Device and reference do the same with the same random bytes; everything is compared, also what lies between pages.
bool agrees(const Case& shape, Mode mode, bool digest, int processors, std::mt19937_64& random) {
    const i64 stride = shape.page_bytes + shape.stride_extra, pitch = shape.page_bytes + shape.pitch_extra;
    const size_t cache_bytes = shape.offset + shape.layers * shape.num_blocks * stride;
    const size_t slab_bytes = shape.offset + static_cast<i64>(shape.layers) * shape.count * pitch;
    const size_t pages = static_cast<size_t>(shape.layers) * shape.count;
    std::vector<u8> cache(cache_bytes), slab(slab_bytes);
    for (auto& byte : cache) byte = static_cast<u8>(random());
    for (auto& byte : slab) byte = static_cast<u8>(random());
    std::vector<int> ids(shape.num_blocks);
    for (int n = 0; n < shape.num_blocks; ++n) ids[n] = n;
    std::shuffle(ids.begin(), ids.end(), random);
    ids.resize(shape.count, 0);
    for (int n = 0; n < shape.count; ++n) {
        if (random() % 8 == 0) ids[n] = -1;
        else if (mode != Mode::kScatter && random() % 8 == 0) ids[n] = static_cast<int>(random() % shape.num_blocks);
    }
    OnDevice<u8> device_cache(cache_bytes), device_slab(slab_bytes);
    OnDevice<int> device_ids(shape.count);
    OnDevice<u64> device_digests(pages);
    OnDevice<Layer> device_layers(shape.layers);
    std::vector<Layer> layers(shape.layers), there(shape.layers);
    for (int l = 0; l < shape.layers; ++l) {
        layers[l] = {cache.data() + shape.offset + l * shape.num_blocks * stride, stride};
        there[l] = {device_cache.at + shape.offset + l * shape.num_blocks * stride, stride};
    }
    device_cache.put(cache);
    device_slab.put(slab);
    device_ids.put(ids);
    device_layers.put(there);
    std::vector<u64> digests(pages, 7);
    device_digests.put(digests);
    const char* fault = move_pages(mode, there.data(), device_layers.at, shape.layers, ids.data(), device_ids.at,
                                   shape.count, shape.num_blocks, device_slab.at + shape.offset, shape.page_bytes,
                                   pitch, digest ? device_digests.at : nullptr, processors, nullptr);
    if (fault) {
        std::fprintf(stderr, "refused: %s\n", fault);
        return false;
    }
    CHECK(cudaDeviceSynchronize());
    reference::move_pages(mode, layers.data(), shape.layers, ids.data(), shape.count, slab.data() + shape.offset,
                          shape.page_bytes, pitch, digest ? digests.data() : nullptr);
    return device_cache.take(cache_bytes) == cache && device_slab.take(slab_bytes) == slab &&
           device_digests.take(pages) == digests;
}

int self_test(int random_cases) {
    std::mt19937_64 random(20261126);
    std::vector<Case> cases;
    for (i64 bytes : {1, 15, 16, 17, 240, 241, 256, 1008, 1023, 1024, 1025, 1040, 1087, 2048, 2112, 65536, 65552}) {
        for (i64 offset : {0, 1, 8}) {
            cases.push_back({2, 5, 4, bytes, offset ? 3 : 16 - bytes % 16, 16 - bytes % 16, offset});
        }
    }
    for (int n = 0; n < random_cases; ++n) {
        const bool even = random() % 4 != 0;
        const i64 bytes = even ? 16 * (1 + random() % 8192) : 1 + random() % 70000;
        const int blocks = 1 + random() % 40;
        cases.push_back({static_cast<int>(1 + random() % 4), blocks, static_cast<int>(1 + random() % blocks), bytes,
                         even ? static_cast<i64>(16 * (random() % 5)) : static_cast<i64>(random() % 77),
                         even ? 0 : static_cast<i64>(random() % 33), even ? 0 : static_cast<i64>(random() % 16)});
    }
    struct Variant {
        Mode mode;
        bool digest;
        const char* name;
    };
    const Variant variants[] = {{Mode::kGather, false, "gather"},
                                 {Mode::kGather, true, "gather, digest"},
                                 {Mode::kScatter, false, "scatter"},
                                 {Mode::kScatter, true, "scatter, digest"},
                                 {Mode::kLook, true, "digest"}};
    int run = 0, wrong = 0;
    for (const Case& shape : cases) {
        for (const Variant& variant : variants) {
            if (variant.digest && shape.page_bytes < kDigestBytesMin) continue;
            ++run;
            // Few processors mean small teams for the same pages.
            if (!agrees(shape, variant.mode, variant.digest, run % 2 ? 1 : 132, random)) {
                ++wrong;
                std::printf("WRONG: %s, %d layers, %d of %d pages of %lld bytes\n", variant.name, shape.layers,
                            shape.count, shape.num_blocks, shape.page_bytes);
            }
        }
    }
    std::printf("self-test: %d of %d cases agree with the reference, byte for byte\n", run - wrong, run);
    return wrong;
}

// Median of `runs` milliseconds. Each run works on other memory than the one before, so that no cache helps.
template <class Work>
float median_ms(int runs, Work work) {
    cudaEvent_t before, after;
    CHECK(cudaEventCreate(&before));
    CHECK(cudaEventCreate(&after));
    std::vector<float> times;
    for (int n = 0; n < runs + 3; ++n) {
        CHECK(cudaEventRecord(before));
        work(n);
        CHECK(cudaEventRecord(after));
        CHECK(cudaEventSynchronize(after));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, before, after));
        if (n >= 3) times.push_back(ms);
    }
    CHECK(cudaEventDestroy(before));
    CHECK(cudaEventDestroy(after));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

void timings() {
    int processors;
    CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    const i64 total = 512ll << 20;
    OnDevice<u8> cache(2 * total), slab(total);
    OnDevice<u64> digests(total / 1024);
    CHECK(cudaMemset(cache.at, 0x5a, 2 * total));
    const float copy = median_ms(15, [&](int n) {
        CHECK(cudaMemcpyAsync(slab.at, cache.at + (n & 1) * total, total, cudaMemcpyDeviceToDevice));
    });
    std::printf("%-28s %8.0f GB/s read + written\n", "device-to-device copy", 2 * total / copy / 1e6);
    std::printf("%-10s %14s %14s %14s %14s %14s\n", "page bytes", "gather", "with digest", "scatter", "with digest",
                "digest (reads)");
    for (i64 bytes : {4ll << 10, 16ll << 10, 32ll << 10, 64ll << 10, 96ll << 10, 256ll << 10, 1ll << 20}) {
        const int count = static_cast<int>(total / bytes), blocks = 2 * count;
        std::vector<int> ids(blocks);
        for (int n = 0; n < blocks; ++n) ids[n] = n;
        std::mt19937_64 random(1);
        std::shuffle(ids.begin(), ids.end(), random);
        OnDevice<int> device_ids(blocks);
        OnDevice<Layer> device_layers(1);
        device_ids.put(ids);
        device_layers.put({{cache.at, bytes}});
        std::printf("%-10lld", bytes);
        const auto show = [&](Mode mode, bool digest) {
            const Launch launch = plan(mode, true, digest, 1, count, bytes, processors);
            const float ms = median_ms(15, [&](int n) {
                enqueue(launch, nullptr, device_layers.at, 1, device_ids.at + (n & 1) * count, count, slab.at, bytes,
                        bytes, digest ? digests.at : nullptr);
            });
            const i64 moved = mode == Mode::kLook ? total : 2 * total;
            std::printf("  %6.0f (%4.2f)", moved / ms / 1e6, moved * copy / (2 * total * ms));
        };
        show(Mode::kGather, false);
        show(Mode::kGather, true);
        show(Mode::kScatter, false);
        show(Mode::kScatter, true);
        show(Mode::kLook, true);
        std::printf("\n");
    }
    CHECK(cudaGetLastError());
}

// Arguments: how many random cases (default 150; 5 is enough under compute-sanitizer), and `test` to skip the timings.
int main(int argc, char** argv) {
    const int wrong = self_test(argc > 1 ? std::atoi(argv[1]) : 150);
    if (wrong == 0 && argc <= 2) timings();
    return wrong == 0 ? 0 : 1;
}

#endif  // PDX_SELF_TEST
#endif  // __CUDACC_RTC__
