#include "linear.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

// One binary for any x86-64: the loader picks the widest of these that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LORA_MOE_WIDE __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LORA_MOE_WIDE
#endif

namespace lora_moe {
namespace {

// Below this many multiplications starting threads costs more than it saves.
constexpr int64_t kSmallWork = 1 << 15;
// Columns of a transposed matrix that are summed at a time, and how many products are summed before they are added up.
constexpr int64_t kColumns = 128;
constexpr int64_t kDepth = 64;

// Sixteen lanes; the compiler splits them over the registers that the processor has.
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
constexpr int64_t kLanes = 16;

#define LORA_MOE_INLINE inline __attribute__((always_inline))

template <class T>
LORA_MOE_INLINE T read(const void* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

// One type of element each: `lanes` reads sixteen of them as fp32.
struct F32 {
  using Element = float;
  static LORA_MOE_INLINE Lanes lanes(const Element* data) { return read<Lanes>(data); }
};
struct BF16 {
  using Element = uint16_t;
  static LORA_MOE_INLINE Lanes lanes(const Element* data) {
    return (Lanes)(__builtin_convertvector(read<Halves>(data), Bits) << 16);
  }
};
struct F16 {
  using Element = uint16_t;
  // Exponents are rebased by a multiplication; subnormal numbers go through the mantissa of 0.5.
  static LORA_MOE_INLINE Lanes lanes(const Element* data) {
    const Bits word = __builtin_convertvector(read<Halves>(data), Bits) << 16;
    const Bits sign = word & 0x80000000u, twice = word + word;
    const Lanes normal = (Lanes)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const Lanes small = (Lanes)((twice >> 17) | (126u << 23)) - 0.5f;
    const Bits bits = twice < (1u << 27) ? (Bits)small : (Bits)normal;
    return (Lanes)(bits | sign);
  }
};

template <class T>
LORA_MOE_INLINE void convert(const typename T::Element* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes lanes = T::lanes(in + i);
    std::memcpy(out + i, &lanes, sizeof(lanes));
  }
  if (i == count) return;
  typename T::Element rest[kLanes] = {};
  std::memcpy(rest, in + i, (count - i) * sizeof(rest[0]));
  const Lanes lanes = T::lanes(rest);
  std::memcpy(out + i, &lanes, (count - i) * sizeof(float));
}

LORA_MOE_INLINE float sum(Lanes lanes) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// The last elements of a row, padded with zeros.
template <class T>
LORA_MOE_INLINE Lanes tail(const typename T::Element* data, int64_t count) {
  typename T::Element rest[kLanes] = {};
  std::memcpy(rest, data, count * sizeof(rest[0]));
  return T::lanes(rest);
}

// Products of one row of weights with `rows` rows of x. Several sums run side by side: one chain of additions would
// wait for each other.
template <class T, int rows, int chains>
LORA_MOE_INLINE void dots(const typename T::Element* w, const float* const* x, int64_t k, float* out) {
  Lanes sums[rows][chains] = {};
  int64_t i = 0;
  for (; i + chains * kLanes <= k; i += chains * kLanes) {
    for (int c = 0; c < chains; ++c) {
      const Lanes weights = T::lanes(w + i + c * kLanes);
      for (int r = 0; r < rows; ++r) sums[r][c] += weights * read<Lanes>(x[r] + i + c * kLanes);
    }
  }
  for (; i < k; i += kLanes) {
    const int64_t count = k - i < kLanes ? k - i : kLanes;
    const Lanes weights = tail<T>(w + i, count);
    for (int r = 0; r < rows; ++r) sums[r][0] += weights * tail<F32>(x[r] + i, count);
  }
  for (int r = 0; r < rows; ++r) {
    Lanes total = sums[r][0];
    for (int c = 1; c < chains; ++c) total += sums[r][c];
    out[r] = sum(total);
  }
}

// Target clones need functions of their own name.
#define LORA_MOE_KERNELS(T, suffix)                                                                             \
  LORA_MOE_WIDE void convert_##suffix(const T::Element* in, int64_t count, float* out) {                        \
    convert<T>(in, count, out);                                                                                 \
  }                                                                                                             \
  LORA_MOE_WIDE void dot_##suffix(const T::Element* w, const float* const* x, int64_t k, float* out) {          \
    dots<T, 1, 4>(w, x, k, out);                                                                                \
  }                                                                                                             \
  LORA_MOE_WIDE void dot2_##suffix(const T::Element* w, const float* const* x, int64_t k, float* out) {         \
    dots<T, 2, 2>(w, x, k, out);                                                                                \
  }                                                                                                             \
  LORA_MOE_WIDE void dot4_##suffix(const T::Element* w, const float* const* x, int64_t k, float* out) {         \
    dots<T, 4, 1>(w, x, k, out);                                                                                \
  }
LORA_MOE_KERNELS(F32, f32)
LORA_MOE_KERNELS(BF16, bf16)
LORA_MOE_KERNELS(F16, f16)

// All rows of x against one row of weights, four at a time.
template <class Element, class Dot>
void row_products(const Element* w, const float* const* x, int64_t k, int64_t rows, float* out, const Dot (&dot)[3]) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot[2](w, x + r, k, out + r);
  for (; r + 2 <= rows; r += 2) dot[1](w, x + r, k, out + r);
  if (r < rows) dot[0](w, x + r, k, out + r);
}

LORA_MOE_WIDE void axpy(float a, const float* x, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += a * x[i];
}

LORA_MOE_WIDE void add_and_clear(float* sum, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] += sum[i];
    sum[i] = 0;
  }
}

const char* at(const void* data, Float type, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(type);
}

// Rows of the matrix lie one behind the other: a dot product for each.
void multiply_rows(
    const Matrix& w, int64_t begin, int64_t end, const float* const* x, float* const* out, int64_t rows) {
  std::vector<float> products(rows);
  for (int64_t n = begin; n < end; ++n) {
    const void* row = at(w.data, w.type, n * w.stride_n);
    if (w.type == Float::f32) {
      row_products(static_cast<const float*>(row), x, w.k, rows, products.data(), {dot_f32, dot2_f32, dot4_f32});
    } else if (w.type == Float::bf16) {
      row_products(static_cast<const uint16_t*>(row), x, w.k, rows, products.data(), {dot_bf16, dot2_bf16, dot4_bf16});
    } else {
      row_products(static_cast<const uint16_t*>(row), x, w.k, rows, products.data(), {dot_f16, dot2_f16, dot4_f16});
    }
    for (int64_t r = 0; r < rows; ++r) out[r][n] = products[r];
  }
}

// Columns lie one behind the other (a transposed view): rows of weights are added up, block by block.
void multiply_columns(
    const Matrix& w, int64_t begin, int64_t end, const float* const* x, float* const* out, int64_t rows) {
  std::vector<float> weights(kColumns), sums(rows * kColumns);
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = std::min(kColumns, end - first);
    for (int64_t r = 0; r < rows; ++r) std::fill_n(out[r] + first, count, 0.0f);
    for (int64_t k = 0; k < w.k; ++k) {
      to_float(w.data, w.type, k * w.stride_k + first, count, weights.data());
      for (int64_t r = 0; r < rows; ++r) axpy(x[r][k], weights.data(), count, sums.data() + r * kColumns);
      if ((k + 1) % kDepth == 0 || k + 1 == w.k) {
        for (int64_t r = 0; r < rows; ++r) add_and_clear(sums.data() + r * kColumns, count, out[r] + first);
      }
    }
  }
}

}  // namespace

int64_t size_of(Float type) {
  return type == Float::f64 ? 8 : type == Float::f32 ? 4 : 2;
}

void to_float(const void* data, Float type, int64_t begin, int64_t count, float* out) {
  const char* source = at(data, type, begin);
  switch (type) {
    case Float::bf16:
      return convert_bf16(reinterpret_cast<const uint16_t*>(source), count, out);
    case Float::f16:
      return convert_f16(reinterpret_cast<const uint16_t*>(source), count, out);
    case Float::f32:
      return convert_f32(reinterpret_cast<const float*>(source), count, out);
    case Float::f64:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(reinterpret_cast<const double*>(source)[i]);
  }
}

float load(const void* data, Float type, int64_t index) {
  float value = 0;
  to_float(data, type, index, 1, &value);
  return value;
}

void store(void* data, Float type, int64_t index, float value) {
  switch (type) {
    case Float::bf16:
      static_cast<c10::BFloat16*>(data)[index] = c10::BFloat16(value);
      return;
    case Float::f16:
      static_cast<c10::Half*>(data)[index] = c10::Half(value);
      return;
    case Float::f32:
      static_cast<float*>(data)[index] = value;
      return;
    case Float::f64:
      static_cast<double*>(data)[index] = value;
  }
}

void multiply(const Matrix& w, int64_t begin, int64_t end, const float* const* x, float* const* out, int64_t rows) {
  if (w.stride_k == 1) {
    multiply_rows(w, begin, end, x, out, rows);
  } else {
    multiply_columns(w, begin, end, x, out, rows);
  }
}

void run_tasks(int64_t count, int64_t work, const std::function<void(int64_t)>& task) {
  if (count <= 1 || work < kSmallWork) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) task(i);
    }
  });
}

}  // namespace lora_moe
