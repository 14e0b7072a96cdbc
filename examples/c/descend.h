/* The functions of nabla_fast that the example calls, linked or loaded. */
#ifndef DESCEND_H_
#define DESCEND_H_

#include "nabla_fast.h"

struct functions {
  int32_t (*abi_version)(void);
  const char* (*status_string)(nabla_fast_status);
  int64_t (*workspace)(int64_t rows, int64_t vocab, int64_t iters, int32_t noise, int32_t groups,
                       int32_t num_threads);
  nabla_fast_status (*descent)(float* z, const float* grad, float* exp_avg, float* exp_avg_sq,
                               int64_t* step, int64_t rows, int64_t vocab, int64_t z_stride,
                               int64_t grad_stride, int64_t exp_avg_stride,
                               int64_t exp_avg_sq_stride, const double* schedule, int64_t iters,
                               int64_t schedule_stride, const int64_t* until, const int64_t* group,
                               double tau, const int64_t* noise_seed, const int64_t* noise_position,
                               int64_t* token, uint8_t* flipped, nabla_fast_status* row_status,
                               void* workspace, int64_t workspace_bytes, int32_t num_threads);
};

/* Descends on three rows of logits and compares with the same in double. 0 if all is well. */
int descend(const struct functions* nabla_fast);

#endif /* DESCEND_H_ */
