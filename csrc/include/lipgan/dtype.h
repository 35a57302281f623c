// Storage types of tensors, numbered as lipgan/ops names them.
#pragma once

namespace lipgan {

enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

}  // namespace lipgan
