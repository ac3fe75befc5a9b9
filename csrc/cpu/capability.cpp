// Which table of row kernels serves this process: the widest that the processor has, or a narrower one if the
// environment variable FASTDISTIL_CPU_CAPABILITY (avx512, avx2 or portable) asks for it. Asking for more than there
// is changes nothing.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastdistil {
namespace {

const Kernels* supported_avx512() {
#if defined(__x86_64__)
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported ? avx512_kernels() : nullptr;
#else
  return nullptr;
#endif
}

const Kernels* supported_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_kernels() : nullptr;
#else
  return nullptr;
#endif
}

const Kernels& choose() {
  const char* variable = std::getenv("FASTDISTIL_CPU_CAPABILITY");
  const std::string wanted = variable == nullptr || *variable == '\0' ? "avx512" : variable;
  if (wanted != "avx512" && wanted != "avx2" && wanted != "portable") {
    throw std::runtime_error("FASTDISTIL_CPU_CAPABILITY must be avx512, avx2 or portable, got " + wanted);
  }
  const Kernels* avx512 = wanted == "avx512" ? supported_avx512() : nullptr;
  if (avx512 != nullptr) return *avx512;
  const Kernels* avx2 = wanted != "portable" ? supported_avx2() : nullptr;
  return avx2 != nullptr ? *avx2 : *portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastdistil
