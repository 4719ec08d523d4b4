// What the C ABI of N:M weights does where their dtype is SPARSECOMP_I8_A8. Arguments are as there, `weight` is not
// null.
#pragma once

#include "common/call.hpp"
#include "sparsecomp.h"

namespace sparsecomp::int8 {

int64_t values_bytes(const sparsecomp_nm& weight);
int64_t metadata_bytes(const sparsecomp_nm& weight);
int pack(const sparsecomp_nm& weight, const void* canonical_values, const uint8_t* canonical_metadata, void* values,
         void* metadata);
int unpack(const sparsecomp_nm& weight, const void* values, const void* metadata, void* canonical_values,
           uint8_t* canonical_metadata);
int to_dense(const sparsecomp_nm& weight, const void* values, const void* metadata, void* dense, int threads);
int linear(const sparsecomp_nm& weight, const LinearCall& call);

}  // namespace sparsecomp::int8
