#include "common/pages.hpp"

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
  const uintptr_t before = -start & (kHugePage - 1);  // until the first whole page
  const auto size = static_cast<uintptr_t>(bytes);
  const uintptr_t whole = size > before ? (size - before) & ~(kHugePage - 1) : 0;
  if (whole == 0) return;
  const int error = errno;
  // the C interface takes no pointer to const, and changes nothing
  if (madvise(static_cast<char*>(const_cast<void*>(data)) + before, whole, advice) != 0) errno = error;
}

}  // namespace

void prefer_huge_pages(const void* data, int64_t bytes) { advise(data, bytes, MADV_HUGEPAGE); }
void gather_huge_pages(const void* data, int64_t bytes) { advise(data, bytes, kCollapse); }
#else
void prefer_huge_pages(const void*, int64_t) {}
void gather_huge_pages(const void*, int64_t) {}
#endif

}  // namespace sparsecomp
