// Registration: schemas, and kernels that need no Python.
//
// `lora_moe::*` gets its kernels below every backend's own: where the Python package registers kernels for the CPU and
// CUDA, those come first, in whatever order the two are loaded. `lora_moe_cpu::*` are the same kernels for that package
// to call behind its own checks.
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "kernels.h"
#include "schemas.h"

namespace lora_moe {
namespace {

// Whether the Python package of this process has defined the schemas (it notes its process id).
bool defined_in_python() {
  const char* process = std::getenv("TORCH_LORA_MOE_SCHEMAS_OF");
  return process && std::to_string(getpid()) == process;
}

void on_cpu(const Tensor& tensor, const char* op) {
  if (tensor.is_cpu()) return;
  throw std::runtime_error(std::string("lora_moe::") + op + ": no kernel for this device without Python; import "
                           "torch_lora_moe, whose CUDA kernels are Triton's, or run on the CPU");
}

template <auto kernel, const char* op>
struct Anywhere;

template <class Out, class... Args, Out (*kernel)(Tensor, Args...), const char* op>
struct Anywhere<kernel, op> {
  static Out call(Tensor first, Args... args) {
    on_cpu(first, op);
    return kernel(std::move(first), std::move(args)...);
  }
};

constexpr char kRoute[] = "route", kShrink[] = "lora_shrink", kExpand[] = "lora_expand_add_", kAdd[] = "lora_add_",
               kFused[] = "fused_experts";

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl(kRoute, TORCH_BOX((&Anywhere<route, kRoute>::call)));
  m.impl(kShrink, TORCH_BOX((&Anywhere<lora_shrink, kShrink>::call)));
  m.impl(kExpand, TORCH_BOX((&Anywhere<lora_expand_add_, kExpand>::call)));
  m.impl(kAdd, TORCH_BOX((&Anywhere<lora_add_, kAdd>::call)));
  m.impl(kFused, TORCH_BOX((&Anywhere<fused_experts, kFused>::call)));
}

}  // namespace
}  // namespace lora_moe

STABLE_TORCH_LIBRARY_FRAGMENT(lora_moe, m) {
  if (lora_moe::defined_in_python()) return;
  for (const char* schema : lora_moe::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_FRAGMENT(lora_moe_cpu, m) {
  for (const char* schema : lora_moe::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(lora_moe, CompositeExplicitAutograd, m) { lora_moe::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(lora_moe_cpu, CPU, m) { lora_moe::implement(m); }
