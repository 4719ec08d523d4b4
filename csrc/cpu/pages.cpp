#include "pages.hpp"

#include <cerrno>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsecomp {

#if defined(__linux__)
namespace {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; C libraries older than that do not name it

void advise(const void* data, int64_t bytes, int advice) {
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (first >= last) return;
  const int before = errno;
  if (madvise(reinterpret_cast<void*>(first), last - first, advice) != 0) errno = before;
}

}  // namespace

void prefer_huge_pages(const void* data, int64_t bytes) { advise(data, bytes, MADV_HUGEPAGE); }
void gather_huge_pages(const void* data, int64_t bytes) { advise(data, bytes, kCollapse); }
#else
void prefer_huge_pages(const void*, int64_t) {}
void gather_huge_pages(const void*, int64_t) {}
#endif

}  // namespace sparsecomp
