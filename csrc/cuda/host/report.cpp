#include "host/report.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <map>

namespace nabla_fast::host {
namespace {

constexpr int kMost = 32;

std::string lines;
int count = 0;

std::string last_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// What addr2line prints of an address, without folders; "" if it knows nothing.
std::string symbolized(const std::string& object, uintptr_t offset) {
  if (object.find('\'') != std::string::npos) return "";
  char address[32];
  std::snprintf(address, sizeof address, "0x%jx", static_cast<uintmax_t>(offset));
  const std::string command = "addr2line -i -e '" + object + "' " + address + " 2>/dev/null";
  FILE* const pipe = popen(command.c_str(), "r");
  if (!pipe) return "";
  std::string found;
  char text[4096];
  while (std::fgets(text, sizeof text, pipe)) {
    std::string line = last_name(text);
    // "?" stands for what is unknown, a discriminator behind the line number for nothing of use.
    line = line.substr(0, line.find_first_of(" \n"));
    if (line.find('?') != std::string::npos) break;
    found += (found.empty() ? "" : " < ") + line;
  }
  pclose(pipe);
  return found;
}

}  // namespace

std::string line_of(Place place) {
  static std::map<Place, std::string> known;
  const auto [at, is_new] = known.try_emplace(place);
  if (!is_new) return at->second;
  Dl_info object;
  if (!dladdr(place, &object) || !object.dli_fname) return at->second = "an unknown place";
  // A return address lies behind the call, perhaps already in another line.
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(place) - reinterpret_cast<uintptr_t>(object.dli_fbase) - 1;
  std::string line = symbolized(object.dli_fname, offset);
  if (line.empty()) {
    char text[32];
    std::snprintf(text, sizeof text, "+0x%jx", static_cast<uintmax_t>(offset));
    line = last_name(object.dli_fname) + text;
  }
  return at->second = line;
}

void report(const std::string& line) {
  if (count >= kMost || lines.find(line + "\n") != std::string::npos) return;
  ++count;
  lines += line + "\n";
}

const std::string& reports() { return lines; }

void clear_reports() {
  lines.clear();
  count = 0;
}

}  // namespace nabla_fast::host
