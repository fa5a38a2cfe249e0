// Which of the compiled instruction sets to use on this machine.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fused_norm {
namespace {

// Best last. A table is listed only if this processor (and its operating system) can run it.
int runnable(const Kernels* tables[3]) {
  int count = 0;
  tables[count++] = &kernels_default;
#ifdef FUSED_NORM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    // Every processor with AVX2 has F16C, and older compilers cannot ask for it by name.
    tables[count++] = &kernels_avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw")) {
      tables[count++] = &kernels_avx512;
    }
  }
#endif
  return count;
}

const Kernels* find(const char* name) {
  const Kernels* tables[3];
  const int count = runnable(tables);
  for (int i = 0; i < count; i++) {
    if (!std::strcmp(tables[i]->name, name)) return tables[i];
  }
  return nullptr;
}

// As in torch, ATEN_CPU_CAPABILITY can ask for less than the machine has, never for more.
const Kernels* choose() {
  const Kernels* tables[3];
  const int count = runnable(tables);
  if (const char* wanted = std::getenv("ATEN_CPU_CAPABILITY")) {
    if (const Kernels* found = find(wanted)) return found;
  }
  return tables[count - 1];
}

std::atomic<const Kernels*> in_use{choose()};

}  // namespace

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

int capabilities(const char* names[3]) {
  const Kernels* tables[3];
  const int count = runnable(tables);
  for (int i = 0; i < count; i++) names[i] = tables[i]->name;
  return count;
}

bool set_capability(const char* name) {
  const Kernels* found = find(name);
  if (found) in_use.store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace fused_norm
