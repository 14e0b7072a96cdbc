// What the emulated matrix unit refuses: `misuse NAME` ends with its line, `misuse` lists the names.

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "emulation/units.h"

namespace emulated = nabla_fast::emulated;

namespace {

struct Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 32, 20, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 8, 15};
};

uint8_t memory[1024];

struct Misuse {
  const char* name;
  void (*run)();
};

template <typename Change>
void configure(Change change) {
  Shapes shapes;
  change(shapes);
  emulated::load_config(&shapes);
}
void configure() {
  configure([](Shapes&) {});
}

const Misuse kMisuses[] = {
    {"load before a configuration", [] { emulated::load_tile(0, memory, 64); }},
    {"store after a release",
     [] {
       configure();
       emulated::release();
       emulated::store_tile(0, memory, 64);
     }},
    {"product after a release",
     [] {
       configure();
       emulated::release();
       emulated::add_product(0, 1, 2);
     }},
    {"no release",
     [] {
       configure();
       configure();
     }},
    {"palette", [] { configure([](Shapes& x) { x.palette = 2; }); }},
    {"start row", [] { configure([](Shapes& x) { x.start_row = 1; }); }},
    {"reserved byte", [] { configure([](Shapes& x) { x.reserved[13] = 1; }); }},
    {"ninth tile", [] { configure([](Shapes& x) { x.rows[8] = 1; }); }},
    {"rows", [] { configure([](Shapes& x) { x.rows[0] = 17; }); }},
    {"row bytes", [] { configure([](Shapes& x) { x.row_bytes[0] = 65; }); }},
    {"rows of no bytes", [] { configure([](Shapes& x) { x.row_bytes[0] = 0; }); }},
    {"tile left out",
     [] {
       configure();
       emulated::load_tile(7, memory, 64);
     }},
    {"no such tile",
     [] {
       configure();
       emulated::load_tile(8, memory, 64);
     }},
    {"same tile twice",
     [] {
       configure();
       emulated::add_product(0, 1, 1);
     }},
    {"rows of the left factor",
     [] {
       configure();
       emulated::add_product(0, 5, 2);
     }},
    {"rows of the right factor",
     [] {
       configure();
       emulated::add_product(0, 3, 2);
     }},
    {"columns",
     [] {
       configure();
       emulated::add_product(3, 1, 2);
     }},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Misuse& misuse : kMisuses) {
    if (count < 2) std::printf("%s\n", misuse.name);
    if (count > 1 && std::strcmp(arguments[1], misuse.name) == 0) misuse.run();
  }
  return 0;
}
