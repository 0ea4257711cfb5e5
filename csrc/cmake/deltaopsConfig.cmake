# find_package(deltaops CONFIG) gives the target deltaops::deltaops.
# Works wherever the folder lies: installed (deltaops/cmake) and in a checkout (csrc/cmake).

get_filename_component(_deltaops_include "${CMAKE_CURRENT_LIST_DIR}/../include" ABSOLUTE)
get_filename_component(_deltaops_library
                       "${CMAKE_CURRENT_LIST_DIR}/../../deltaops/libdeltaops.so" ABSOLUTE)

if(NOT EXISTS "${_deltaops_library}")
  set(deltaops_FOUND FALSE)
  set(deltaops_NOT_FOUND_MESSAGE
      "deltaops: ${_deltaops_library} is not there. Build it: python setup.py build_ext --inplace")
  return()
endif()

if(NOT TARGET deltaops::deltaops)
  add_library(deltaops::deltaops SHARED IMPORTED)
  set_target_properties(
    deltaops::deltaops PROPERTIES IMPORTED_LOCATION "${_deltaops_library}" IMPORTED_SONAME
    "libdeltaops.so" INTERFACE_INCLUDE_DIRECTORIES "${_deltaops_include}")
endif()

unset(_deltaops_include)
unset(_deltaops_library)
