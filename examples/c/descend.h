/* The functions of nabla_fast that the example calls, linked or loaded. */
#ifndef DESCEND_H_
#define DESCEND_H_

#include "nabla_fast.h"

struct functions {
  int32_t (*abi_version)(void);
  const char* (*status_string)(nabla_fast_status);
  int64_t (*workspace)(const nabla_fast_descent_args*);
  nabla_fast_status (*descent)(const nabla_fast_descent_args*);
};

/* Descends on three rows of logits and compares with the same in double. 0 if all is well. */
int descend(const struct functions* nabla_fast);

#endif /* DESCEND_H_ */
