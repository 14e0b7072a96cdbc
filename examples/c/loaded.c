/* The example with the library loaded at run time: loaded PATH_OF_THE_LIBRARY. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "descend.h"

/* ISO C has no cast from an object's address to a function's. */
static void find(void* library, const char* name, void* function) {
  void* const symbol = dlsym(library, name);
  memcpy(function, &symbol, sizeof symbol);
}

int main(int count, char** arguments) {
  struct functions nabla_fast;
  void* const library = count == 2 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : NULL;
  int result;
  if (!library) {
    fprintf(stderr, "%s\n", count == 2 ? dlerror() : "usage: loaded PATH_OF_THE_LIBRARY");
    return 1;
  }
  find(library, "nabla_fast_abi_version", &nabla_fast.abi_version);
  find(library, "nabla_fast_status_string", &nabla_fast.status_string);
  find(library, "nabla_fast_dto_descent_workspace", &nabla_fast.workspace);
  find(library, "nabla_fast_dto_descent", &nabla_fast.descent);
  if (!nabla_fast.abi_version || !nabla_fast.status_string || !nabla_fast.workspace ||
      !nabla_fast.descent) {
    fprintf(stderr, "a function is missing\n");
    return 1;
  }
  result = descend(&nabla_fast);
  return dlclose(library) || result;
}
