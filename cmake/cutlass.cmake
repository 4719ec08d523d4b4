# The CUTLASS kernels of sm_90 (csrc/cuda), one shared library for each configuration, into the package.
#
# Which tools are used, which configurations there are, how they are compiled and what a library is called is decided in
# sparsecomp/backends/gpu/cutlass/build.py, which compiles on first use what was not built here.
set(SPARSECOMP_CUTLASS AUTO CACHE STRING "Build the CUTLASS kernels: ON, OFF, or AUTO (where nvcc and CUTLASS are found)")
set_property(CACHE SPARSECOMP_CUTLASS PROPERTY STRINGS AUTO ON OFF)
set(SPARSECOMP_CUTLASS_TYPES "bfloat16,float16" CACHE STRING "Types to build them for: bfloat16, float16, fp8, fp8-fast")
set(CUTLASS_PATH "" CACHE PATH "CUTLASS, or its folder include; empty: the environment's CUTLASS_PATH, the wheel")

if(NOT SPARSECOMP_CUTLASS MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SPARSECOMP_CUTLASS is ${SPARSECOMP_CUTLASS}; set it to AUTO, ON or OFF")
elseif(SPARSECOMP_CUTLASS STREQUAL "OFF")
  message(STATUS "CUTLASS kernels: not built (SPARSECOMP_CUTLASS=OFF), compiled on first use instead")
  return()
endif()

set(tool ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/cutlass.py --types ${SPARSECOMP_CUTLASS_TYPES})
set(environment)
if(CUTLASS_PATH)
  set(environment CUTLASS_PATH=${CUTLASS_PATH})
endif()
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env ${environment} ${tool} --plan
  OUTPUT_VARIABLE plan ERROR_VARIABLE reason RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT failed EQUAL 0)
  string(STRIP "${reason}" reason)
  string(REGEX REPLACE "^error: " "" reason "${reason}")
  if(SPARSECOMP_CUTLASS STREQUAL "ON")
    message(FATAL_ERROR "SPARSECOMP_CUTLASS=ON, but ${reason}")
  endif()
  message(STATUS "CUTLASS kernels: not built, ${reason}")
  return()
endif()

string(REPLACE "\n" ";" plan "${plan}")
list(POP_FRONT plan nvcc headers)
# the tools found now, whatever the environment is when the build runs
cmake_path(GET nvcc PARENT_PATH top)
cmake_path(GET top PARENT_PATH top)
set(tool ${CMAKE_COMMAND} -E env CUDA_HOME=${top} CUTLASS_PATH=${headers} ${tool})
# a name is a hash of all that a library is made of: a file of that name needs no other dependency, and a change of any
# of these gives other names
file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*)
list(APPEND sources sparsecomp/backends/gpu/cutlass/build.py sparsecomp/backends/gpu/cutlass/config.py)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})
set(folder ${CMAKE_CURRENT_BINARY_DIR}/cutlass_libraries)
file(MAKE_DIRECTORY ${folder})
set(libraries)
foreach(line IN LISTS plan)
  string(REPLACE " " ";" line "${line}")
  list(GET line 0 configuration)
  list(GET line 1 name)
  set(command ${tool} --compile ${configuration} ${folder}/${name})
  if(SPARSECOMP_CUTLASS STREQUAL "AUTO")
    # a compiler that was found and fails must not cost the package; the reason is printed, and again on first use
    list(APPEND command --optional)
  endif()
  add_custom_command(
    OUTPUT ${folder}/${name} COMMAND ${command} VERBATIM
    COMMENT "nvcc wgmma_sp ${configuration}, about a minute")
  list(APPEND libraries ${folder}/${name})
endforeach()
list(LENGTH libraries count)
message(STATUS "CUTLASS kernels: ${count} libraries (${SPARSECOMP_CUTLASS_TYPES}) with ${nvcc} and ${headers}")
add_custom_target(sparsecomp_cutlass ALL DEPENDS ${libraries})
# optional, since in AUTO some may be missing; with ON the build would have failed
install(FILES ${libraries} DESTINATION cutlass_libraries COMPONENT cutlass OPTIONAL)  # wheel.install-dir is the package
