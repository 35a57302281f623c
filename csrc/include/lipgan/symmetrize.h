// The op symmetrize: a square matrix A that is symmetric up to rounding, as its symmetric part in double; and what shows
// whether it is so.
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"

namespace lipgan::cpu {

// Reads A once, and writes nothing else: most covariances are symmetric to the last bit.
// a: [n, n], of any dtype
void symmetrize_look(Dtype dtype, const void* a, int64_t n,
                     double* seen,  // [2]: max|A|, NaN where A is not finite; max|A - A^T|
                     int num_threads);

void symmetrize_fwd(Dtype dtype, const void* a, int64_t n,
                    double* symmetric,  // [n, n]: (A + A^T) / 2
                    int num_threads);

}  // namespace lipgan::cpu
