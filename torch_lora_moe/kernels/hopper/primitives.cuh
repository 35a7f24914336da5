// What the product kernel asks of the machine, one instruction or two to a function, for compute capability 9.0 alone.
//
// Addresses of shared memory are numbers (u32), as the instructions take them. Stands in front of product.cu, behind the
// constants of a launch.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// of the driver: stands for a tensor that the copy engine reads box by box
struct alignas(64) TensorMap {
  u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Barriers in shared memory: of `count` arrivals and of all bytes that were announced; waited for by parity.

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barriers_are_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_announce(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Barriers of 128 threads, by number.

__device__ __forceinline__ void group_sync(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

__device__ __forceinline__ bool any_of_group(int number, bool mine) {
  u32 any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.u32 mine, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, 128, mine;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}\n" : "=r"(any) : "r"((u32)mine), "r"(number) : "memory");
  return any;
}

// When lines leave L2: before all others, in their turn, behind all others.

__device__ __forceinline__ u64 goes_first() {
  u64 priority;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(priority));
  return priority;
}

__device__ __forceinline__ u64 goes_in_turn() {
  u64 priority;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(priority));
  return priority;
}

__device__ __forceinline__ u64 goes_last() {
  u64 priority;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(priority));
  return priority;
}

// Copies into shared memory. Those of threads count at a barrier as one arrival each when they have landed, those of the
// copy engine as their bytes.

__device__ __forceinline__ void copy16(u32 target, const void* source, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_box(
    u32 target, const TensorMap* map, u32 barrier, int column, int row, int slice, int matrix, u64 priority) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      ::"r"(target), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(slice), "r"(matrix), "l"(priority) : "memory");
}

__device__ __forceinline__ void copy_rows(u32 target, const TensorMap* map, u32 barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(target), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}

// Products. A group of 128 threads multiplies 64 rows with up to 144 others, both in shared memory as the copy engine
// swizzles rows of `PITCH` bytes, 16 columns at a time; its threads hold the sums.

template <int PITCH>
__device__ __forceinline__ u64 matrix_descriptor(u32 address) {
  constexpr u64 swizzle = PITCH == 128 ? 1 : PITCH == 64 ? 2 : 3;
  // groups of eight rows follow each other
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(PITCH / 2) << 32) | (swizzle << 62);
}

// what threads have written is there for products
__device__ __forceinline__ void writes_are_there() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void products_start() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// until at most so many of the last ones are under way
template <int COUNT>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

// Reads and writes of shared memory, and writes of results, 16 bytes to a thread.

__device__ __forceinline__ uint4 load_line(u32 address) {
  uint4 line;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w) : "r"(address) : "memory");
  return line;
}

__device__ __forceinline__ void store_line(u32 address, uint4 line) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(line.x), "r"(line.y), "r"(line.z), "r"(line.w) : "memory");
}

__device__ __forceinline__ void store_global(void* target, uint4 line, u64 priority) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;"
               ::"l"(target), "r"(line.x), "r"(line.y), "r"(line.z), "r"(line.w), "l"(priority) : "memory");
}

// Four blocks of 8 x 8 sums of a warp, as products leave them, turned around: `address` is where thread 8 i + j has
// column j of block i.
__device__ __forceinline__ void store_turned(u32 address, const u32* blocks) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(blocks[0]), "r"(blocks[1]), "r"(blocks[2]), "r"(blocks[3]) : "memory");
}

// Numbers of the model's type, two in a register.

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// `sum` plus zero times both: zero, or NaN if one is not finite
__device__ __forceinline__ u32 add_zero_times(u32 both, u32 sum) {
  asm("fma.rn." ELEMENT "x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(both), "r"(0));
  return sum;
}

// the largest finite numbers instead of NaN and infinities
__device__ __forceinline__ u32 finite(u32 both) {
  constexpr u32 most = IS_BF16 ? 0x7F7F7F7F : 0x7BFF7BFF;
  asm("min." ELEMENT "x2 %0, %0, %1;" : "+r"(both) : "r"(most));
  asm("max." ELEMENT "x2 %0, %0, %1;" : "+r"(both) : "r"(most | 0x80008000));
  return both;
}

__device__ __forceinline__ float from_f16(u16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
  return wide;
}

__device__ __forceinline__ float from_bits(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ int of_lane(int value, int lane) { return __shfl_sync(~0u, value, lane); }

__device__ __forceinline__ int of_lane_before(int value, int distance) { return __shfl_up_sync(~0u, value, distance); }

// Kernels before and after this one, and registers that one part of a program leaves to the other.

__device__ __forceinline__ void wait_for_producer() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void release_consumer() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 72;"); }

__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 216;"); }
