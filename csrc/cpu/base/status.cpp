#include "nabla_fast.h"

int32_t nabla_fast_abi_version(void) { return NABLA_FAST_ABI_VERSION; }

const char* nabla_fast_status_string(nabla_fast_status status) {
  switch (status) {
    case NABLA_FAST_OK:
      return "ok";
    case NABLA_FAST_ROW_NAN:
      return "the row holds a NaN";
    case NABLA_FAST_ROW_INFINITE:
      return "the row holds +inf";
    case NABLA_FAST_ROW_ALL_MASKED:
      return "every logit of the row is -inf";
    case NABLA_FAST_INVALID_SHAPE:
      return "a size is negative, the vocabulary is empty, or widths differ";
    case NABLA_FAST_INVALID_TAU:
      return "tau is not in [2^-64, 2^64]";
    case NABLA_FAST_INVALID_POINTER:
      return "a pointer is null";
    case NABLA_FAST_UNKNOWN_DTYPE:
      return "a dtype is unknown, or not one that the argument can have";
    case NABLA_FAST_UNKNOWN_ISA:
      return "the instruction set is unknown";
    case NABLA_FAST_BAD_ROWS:
      return "a row has no answer";
    case NABLA_FAST_INVALID_STEPS:
      return "a step count is negative or beyond the schedule";
    case NABLA_FAST_WORKSPACE_TOO_SMALL:
      return "the workspace is too small";
    case NABLA_FAST_INVALID_TOKEN:
      return "a token is not in the vocabulary, or has no row in a table";
    case NABLA_FAST_INVALID_HEADS:
      return "a size of the attention is negative, too large, or does not fit the others";
    case NABLA_FAST_INVALID_PREFIX:
      return "a prefix is longer than its block table, or a block of it is not in the pool";
    case NABLA_FAST_TOO_LARGE:
      return "a size or a stride is larger than any address space";
    case NABLA_FAST_INVALID_SIZE:
      return "the struct's size is not one that it has had, or an unknown field is not 0";
    case NABLA_FAST_OVERLAP:
      return "an output overlaps itself or another argument";
    case NABLA_FAST_INVALID_SOFTCAP:
      return "softcap must be between 2^-64 and 2^64, or 0 for none";
    case NABLA_FAST_INVALID_FILTER:
      return "top_k is negative, or top_p is not in (0, 1]";
    case NABLA_FAST_INVALID_SCALE:
      return "a scale of logits is not finite";
    case 64:  // NABLA_FAST_DEVICE_REFUSED, of nabla_fast_cuda.h
      return "there is no CUDA device, or it has refused a launch";
    default:
      return "unknown status";
  }
}
