// Huge pages for weights: products stream through them, and every small page is a look-up that prefetches cannot cross.
#pragma once

#include <cstdint>

namespace sparsecomp {

// Hints, on the whole huge pages inside [data, data + bytes). Where the operating system has none, nothing changes.
void prefer_huge_pages(const void* data, int64_t bytes);  // before it is filled: memory that nobody has touched
void gather_huge_pages(const void* data, int64_t bytes);  // after it is filled: memory that was used before

}  // namespace sparsecomp
