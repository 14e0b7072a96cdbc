# find_package(nabla_fast): the target nabla_fast::nabla_fast, a shared library with a C interface, and where
# `make cuda` has built it nabla_fast::nabla_fast_cuda, the same for CUDA devices.
#
# Everything is found from where this file lies, so the package may be moved as a whole; the relative
# paths are the same ones in an installed package and in a source tree.

cmake_policy(PUSH)
cmake_policy(VERSION 3.15...3.30)

get_filename_component(_nabla_fast_include "${CMAKE_CURRENT_LIST_DIR}/../include" REALPATH)
get_filename_component(_nabla_fast_library
                       "${CMAKE_CURRENT_LIST_DIR}/../../nabla_fast/libnabla_fast.so" REALPATH)

if(NOT EXISTS "${_nabla_fast_library}")
  set(nabla_fast_FOUND FALSE)
  set(nabla_fast_NOT_FOUND_MESSAGE
      "${_nabla_fast_library} is not there: no working C++ compiler was found when nabla_fast was installed")
elseif(NOT TARGET nabla_fast::nabla_fast)
  add_library(nabla_fast::nabla_fast SHARED IMPORTED)
  set_target_properties(
    nabla_fast::nabla_fast
    PROPERTIES IMPORTED_LOCATION "${_nabla_fast_library}"
               IMPORTED_SONAME libnabla_fast.so
               INTERFACE_INCLUDE_DIRECTORIES "${_nabla_fast_include}")
endif()

get_filename_component(_nabla_fast_cuda_library
                       "${CMAKE_CURRENT_LIST_DIR}/../../nabla_fast/libnabla_fast_cuda.so" REALPATH)
if(EXISTS "${_nabla_fast_cuda_library}" AND NOT TARGET nabla_fast::nabla_fast_cuda)
  add_library(nabla_fast::nabla_fast_cuda SHARED IMPORTED)
  set_target_properties(
    nabla_fast::nabla_fast_cuda
    PROPERTIES IMPORTED_LOCATION "${_nabla_fast_cuda_library}"
               IMPORTED_SONAME libnabla_fast_cuda.so
               INTERFACE_INCLUDE_DIRECTORIES "${_nabla_fast_include}")
endif()

unset(_nabla_fast_cuda_library)
unset(_nabla_fast_include)
unset(_nabla_fast_library)
cmake_policy(POP)
