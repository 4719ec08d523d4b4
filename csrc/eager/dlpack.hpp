// What this module needs of DLPack 1.3: a tensor as plain C data, and the table of functions by which a framework fills
// it in (torch 2.10 and newer: torch.Tensor.__dlpack_c_exchange_api__). The layouts are those of the standard's
// dlpack.h; they hold for every version of the same major number.
#ifndef SPARSECOMP_EAGER_DLPACK_HPP
#define SPARSECOMP_EAGER_DLPACK_HPP

#include <cstdint>

namespace dlpack {

constexpr uint32_t kMajor = 1;
constexpr const char* kTableName = "dlpack_exchange_api";  // of the capsule
constexpr int32_t kCpu = 1;

// Codes of element types.
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;

struct Type {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// Strides are in elements; shape and strides stay the property of the framework.
struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t dims;
  Type dtype;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

// What stands first in every table, so that an older one can be found.
struct Header {
  uint32_t major;
  uint32_t minor;
  const Header* previous;
};

// Views an object of the type the table came from, owning nothing; 0, or -1 with a Python exception set. The standard
// promises no more, but torch takes the subclasses of its tensor as well, nn.Parameter among them.
using View = int (*)(void* object, Tensor* view);

struct Table {
  Header header;
  void (*allocate)();
  void (*export_managed)();
  void (*import_managed)();
  View view;
  void (*current_stream)();
};

}  // namespace dlpack

#endif
