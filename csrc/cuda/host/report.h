// Reports of what device code did wrong: one line each, in the order in which it was seen.
#ifndef NABLA_FAST_CUDA_HOST_REPORT_H_
#define NABLA_FAST_CUDA_HOST_REPORT_H_

#include <string>

namespace nabla_fast::host {

// Address of an instruction of device code.
using Place = const void*;

// "file:line" of a place, or "object+offset" where the debugging information or addr2line is
// missing. Callers that a function was inlined into follow after "<".
std::string line_of(Place place);

// Keeps a line. Equal ones are kept once, and no more than 32 in all.
void report(const std::string& line);

// All lines, each ended by a newline.
const std::string& reports();
void clear_reports();

}  // namespace nabla_fast::host

#endif  // NABLA_FAST_CUDA_HOST_REPORT_H_
