# The package's own version. Minor versions may change the interface, as long as the major one is 0.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../../nabla_fast/_version.py" _nabla_fast_version
     REGEX "^__version__ = ")
string(REGEX REPLACE ".*\"(.*)\".*" "\\1" PACKAGE_VERSION "${_nabla_fast_version}")
unset(_nabla_fast_version)

if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _nabla_fast_here "${PACKAGE_VERSION}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _nabla_fast_asked "${PACKAGE_FIND_VERSION}.0")
if(PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION
   AND _nabla_fast_here VERSION_EQUAL _nabla_fast_asked)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
unset(_nabla_fast_here)
unset(_nabla_fast_asked)
