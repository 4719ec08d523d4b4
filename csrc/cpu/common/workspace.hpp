// A buffer that grows and is used again by the next call on the same thread.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace sparsecomp {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // `bytes` bytes at a multiple of 64, of any content; nullptr if there is no memory.
  void* reserve(int64_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = 0;
    const auto rounded = static_cast<size_t>((bytes + 63) / 64 * 64);
    data_ = std::aligned_alloc(64, rounded);
    if (data_) size_ = static_cast<int64_t>(rounded);
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace sparsecomp
