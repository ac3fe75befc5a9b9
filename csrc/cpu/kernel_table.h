// The table of one instruction set; included by kernels_<set>.cpp after its definitions.
#pragma once

#include "attention_kl_tiles.h"
#include "attention_mse_tiles.h"
#include "cosine_loss_rows.h"
#include "hidden_mse_rows.h"
#include "kd_loss_rows.h"
#include "scale_grad_rows.h"

namespace fastdistil::FASTDISTIL_SET {

inline void convert_to_float(const void* source, Dtype dtype, int64_t n, float* target) {
  to_acc(source, dtype, n, target);
}

inline void convert_to_double(const void* source, Dtype dtype, int64_t n, double* target) {
  to_acc(source, dtype, n, target);
}

inline void convert_from_float(const float* source, int64_t n, Dtype dtype, void* target) {
  from_acc(source, n, dtype, target);
}

inline void convert_from_double(const double* source, int64_t n, Dtype dtype, void* target) {
  from_acc(source, n, dtype, target);
}

#define FASTDISTIL_TEXT(x) FASTDISTIL_TEXT_OF(x)
#define FASTDISTIL_TEXT_OF(x) #x

const Kernels kTable{
    FASTDISTIL_TEXT(FASTDISTIL_SET),
    kd_loss_row<float>,
    kd_loss_row<double>,
    cosine_loss_row<float>,
    cosine_loss_row<double>,
    hidden_mse_row<float>,
    hidden_mse_row<double>,
    attention_kl_forward<float>,
    attention_kl_forward<double>,
    attention_kl_backward<float>,
    attention_kl_backward<double>,
    attention_mse_head<float>,
    attention_mse_head<double>,
    scale_row,
    convert_to_float,
    convert_to_double,
    convert_from_float,
    convert_from_double,
};

}  // namespace fastdistil::FASTDISTIL_SET
