// The machine that kernels/hopper asks for, on a CPU: a program's threads as contexts that take turns at random.
//
// Copies land later than they are made, and products read their inputs as late as the kernel allows (where it waits for
// them), so that what a barrier does not order goes wrong here. Memory is poison until something is written: stages
// whenever they are given back, and what a kernel before this one makes until it is waited for.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct TensorMap {
  u64 pointer, swizzled_bytes, sizes[4], strides[4], box[4], unused[2];
};
struct uint4 {
  u32 x, y, z, w;
};
struct Index {
  unsigned x;
};

static Index threadIdx, blockIdx, gridDim, blockDim;
alignas(1024) char shared[SHARED_BYTES];

template <class T> static T min(T a, T b) { return a < b ? a : b; }
template <class T> static T max(T a, T b) { return a > b ? a : b; }

constexpr int THREADS = 384;
using Work = std::function<void()>;

struct Barrier {
  u32 count, missing, phase;
  long bytes;
};
// threads that meet: how many are there, and how often all were
struct Meeting {
  int there = 0, times = 0;
  bool any = false, result = false;
};
struct Thread {
  ucontext_t context;
  bool ended;
  std::deque<Work> copies;
  std::vector<Work> products;
  std::deque<std::vector<Work>> groups;
  u32 held[4], address;
  int value;
};

static std::mt19937 random_numbers;
static std::vector<Thread> threads;
static std::vector<std::vector<char>> stacks;
static std::deque<Work> engine;
static Barrier barriers[64];
static Meeting group_meetings[16], warp_meetings[THREADS / 32], all_threads;
static ucontext_t scheduler;
static Work when_waited;
static bool was_waited;

static void fail(const char* what) {
  std::fprintf(stderr, "hopper_machine: %s\n", what);
  std::abort();
}
static Thread& self() { return threads[threadIdx.x]; }
static void pause() { swapcontext(&self().context, &scheduler); }

static bool meet(Meeting& meeting, int size, bool mine = false) {
  const int time = meeting.times;
  meeting.any |= mine;
  if (++meeting.there == size) {
    meeting.there = 0, meeting.times++, meeting.result = meeting.any, meeting.any = false;
  }
  while (meeting.times == time) pause();
  return meeting.result;
}
static void __syncthreads() { meet(all_threads, THREADS); }
static void meet_warp() { meet(warp_meetings[threadIdx.x / 32], 32); }

static u32 shared_address(const void* pointer) { return (u32)((const char*)pointer - shared); }

// ------ barriers

static Barrier& barrier_at(u32 address);
static void given_back(u32 address);
static void settle(u32 address) {
  Barrier& barrier = barrier_at(address);
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.phase++, barrier.missing = barrier.count;
    given_back(address);
  }
}
static void barrier_init(u32 address, u32 count) { barrier_at(address) = {count, count, 0, 0}; }
static void barriers_are_made() {}
static void barrier_wait(u32 address, u32 parity) {
  while ((barrier_at(address).phase & 1) == parity) pause();
}
static void barrier_arrive(u32 address) {
  if (barrier_at(address).missing == 0) fail("more arrivals than a barrier counts");
  barrier_at(address).missing--;
  settle(address);
}
static void barrier_announce(u32 address, u32 bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}
static void group_sync(int number) { meet(group_meetings[number], 128); }
static bool any_of_group(int number, bool mine) { return meet(group_meetings[number], 128, mine); }

// ------ copies

static void copy16(u32 target, const void* source, u32 bytes) {
  self().copies.push_back([=] {
    std::memset(shared + target, 0, 16);
    std::memcpy(shared + target, source, bytes);
  });
}
static void copies_arrive(u32 barrier) {
  self().copies.push_back([=] { barrier_arrive(barrier); });
}
static u32 swizzled_address(u32 address, u32 pitch) {
  return address ^ ((address >> 7 & (pitch / 16 - 1)) << 4);
}
static void copy_boxes(u32 target, const TensorMap* map, u32 barrier, const int (&at)[4]) {
  engine.push_back([=] {
    const u32 pitch = map->box[0] * 2, lines = map->box[1] * map->box[2] * map->box[3];
    if (pitch != map->swizzled_bytes) fail("a box is as wide as its swizzle here");
    for (u32 line = 0; line < lines; ++line) {
      const u32 place[4] = {0, line % (u32)map->box[1], line / (u32)map->box[1] % (u32)map->box[2], line / (u32)(map->box[1] * map->box[2])};
      u64 offset = 0;
      bool inside = true;
      for (int d = 1; d < 4; ++d) {
        const u64 index = at[d] + place[d];
        inside &= index < map->sizes[d];
        offset += index * map->strides[d];
      }
      for (u32 i = 0; i < map->box[0]; ++i) {
        u16 value = 0;
        if (inside && at[0] + i < map->sizes[0]) std::memcpy(&value, (char*)map->pointer + offset + (at[0] + i) * 2, 2);
        std::memcpy(shared + swizzled_address(target + line * pitch + i * 2, pitch), &value, 2);
      }
    }
    barrier_at(barrier).bytes -= lines * pitch;
    settle(barrier);
  });
}
// there is no L2, but what leaves it first must not be wanted again: a weight by nobody, B by no other program
static const TensorMap* weight;
static std::map<std::vector<u64>, unsigned> left_first;
static u64 goes_first() { return 1; }
static u64 goes_in_turn() { return 2; }
static u64 goes_last() { return 3; }
static void copy_box(u32 target, const TensorMap* map, u32 barrier, int column, int row, int slice, int matrix, u64 priority) {
  const std::vector<u64> box = {map->pointer, (u64)column, (u64)row, (u64)slice, (u64)matrix};
  const auto before = left_first.find(box);
  if (before != left_first.end() && (map == weight || before->second != blockIdx.x)) fail("read again what was to leave L2 first");
  if (priority == goes_first()) left_first[box] = blockIdx.x;
  copy_boxes(target, map, barrier, {column, row, slice, matrix});
}
static void copy_rows(u32 target, const TensorMap* map, u32 barrier, int column, int row) {
  copy_boxes(target, map, barrier, {column, row, 0, 0});
}

// ------ numbers

static float from_bits(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static u32 to_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static float from_f16(u16 value) {
  const int exponent = value >> 10 & 31, fraction = value & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return value & 0x8000 ? -size : size;
}
static u16 to_f16(float value) {
  const u16 sign = to_bits(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size == 0) return sign;
  const int exponent = max(std::ilogb(size), -14);
  // to even, as the machine rounds
  const int steps = (int)std::nearbyint(std::ldexp(size, 10 - exponent));
  return sign | (u16)((exponent + 14) * 1024 + steps);
}
static float from_half(u16 value) { return IS_BF16 ? from_bits((u32)value << 16) : from_f16(value); }
static u16 to_half(float value) {
  if (!IS_BF16) return to_f16(value);
  if (std::isnan(value)) return 0x7FFF;
  const u32 bits = to_bits(value);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static u32 pack(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
static u32 each_half(u32 both, const std::function<u16(u16)>& change) {
  return change((u16)both) | (u32)change(both >> 16) << 16;
}
static u32 add_zero_times(u32 both, u32 sum) {
  return each_half(both, [](u16 half) -> u16 { return std::isfinite(from_half(half)) ? 0 : 0x7FFF; }) | sum;
}
static u32 finite(u32 both) {
  const u16 most = IS_BF16 ? 0x7F7F : 0x7BFF;
  return each_half(both, [=](u16 half) -> u16 {
    const float value = from_half(half);
    return std::isnan(value) ? most : std::isinf(value) ? most | (half & 0x8000) : half;
  });
}
static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// ------ products

template <int PITCH>
static u64 matrix_descriptor(u32 address) { return address >> 4 | (u64)PITCH << 32; }
static float element(u64 descriptor, u32 row, u32 column) {
  const u32 pitch = descriptor >> 32, address = (u32)(descriptor & 0x3FFF) * 16 + row * pitch + column * 2;
  u16 value;
  std::memcpy(&value, shared + swizzled_address(address, pitch), 2);
  return from_half(value);
}
template <int WIDTH>
static void multiply(float (&sums)[72], u64 left, u64 right, bool add) {
  const u32 lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  float* own = sums;
  self().products.push_back([=] {
    for (u32 i = 0; i < WIDTH / 2; ++i) {
      const u32 row = first_row + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (u32 k = 0; k < 16; ++k) sum += element(left, row, k) * element(right, column, k);
      own[i] = add ? own[i] + sum : sum;
    }
  });
}
static void writes_are_there() {}
static void products_start() {}
static void products_end() { self().groups.push_back(std::move(self().products)), self().products.clear(); }
template <int COUNT>
static void products_wait() {
  if (!self().products.empty()) fail("products that belong to no group");
  while ((int)self().groups.size() > COUNT) {
    for (const Work& product : self().groups.front()) product();
    self().groups.pop_front();
  }
  // a warp waits as one
  meet_warp();
}

// ------ lines, lanes, kernels

static uint4 load_line(u32 address) {
  uint4 line;
  std::memcpy(&line, shared + address, 16);
  return line;
}
static void store_line(u32 address, uint4 line) { std::memcpy(shared + address, &line, 16); }
// what L2 is to keep
static std::set<const void*> left_last;
static void store_global(void* target, uint4 line, u64 priority) {
  std::memcpy(target, &line, 16);
  if (priority == goes_last()) left_last.insert(target);
}
static void store_turned(u32 address, const u32* blocks) {
  std::memcpy(self().held, blocks, 16);
  meet_warp();
  const u32 lane = threadIdx.x % 32, first = threadIdx.x - lane, block = lane / 8, column = lane % 8;
  for (u32 row = 0; row < 8; ++row) {
    const u16 value = threads[first + row * 4 + column / 2].held[block] >> column % 2 * 16;
    std::memcpy(shared + address + row * 2, &value, 2);
  }
  meet_warp();
}
static int of_lane(int value, int lane) {
  self().value = value;
  meet_warp();
  const int result = threads[threadIdx.x / 32 * 32 + lane].value;
  meet_warp();
  return result;
}
static int of_lane_before(int value, int distance) {
  const int lane = threadIdx.x % 32;
  return of_lane(value, lane >= distance ? lane - distance : lane);
}
static void wait_for_producer() {
  if (!was_waited) when_waited();
  was_waited = true;
}
static void release_consumer() {}
static void give_registers() {}
static void take_registers() {}
