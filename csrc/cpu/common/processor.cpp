#include "common/processor.hpp"

#include <unistd.h>

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparsecomp {
namespace {

bool made_by_intel() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return false;
  const unsigned vendor[] = {b, d, c};
  return std::memcmp(vendor, "GenuineIntel", sizeof vendor) == 0;
#else
  return false;
#endif
}

int64_t find_l1_bytes() {
  constexpr int64_t kUsual = 32 << 10;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return found > 0 ? found : kUsual;
#else
  return kUsual;
#endif
}

}  // namespace

const Processor& processor(const Isa& isa) {
  static const Processor found = [&] {
    Processor of{made_by_intel(), find_l1_bytes()};
    if (isa.rates) isa.rates(&of.rates);
    return of;
  }();
  return found;
}

}  // namespace sparsecomp
