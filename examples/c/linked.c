/* The example with the library linked in. */
#include "descend.h"

int main(void) {
  const struct functions nabla_fast = {nabla_fast_abi_version, nabla_fast_status_string,
                                       nabla_fast_dto_descent_workspace, nabla_fast_dto_descent};
  return descend(&nabla_fast);
}
