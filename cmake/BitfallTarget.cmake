# Settings that every bitfall target shares.

function(bitfall_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR})
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Werror ${BITFALL_WARNING_EXCEPTIONS}>)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_EXTENSIONS OFF)
endfunction()

# bitfall_test(NAME LABEL label SOURCES a.cpp ... LIBRARIES lib ...): one GoogleTest binary = one ctest entry.
function(bitfall_test name)
  cmake_parse_arguments(arg "" "LABEL" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  bitfall_target(${name})
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} GTest::gtest GTest::gmock GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  # An impossible allocation is an error that tests ask for, not one that a sanitizer should end.
  set(environment ASAN_OPTIONS=allocator_may_return_null=1)
  if(TARGET bitfall_cuda)
    list(APPEND environment BITFALL_CUDA_LIBRARY=$<TARGET_FILE:bitfall_cuda>)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS ${arg_LABEL} TIMEOUT 600 ENVIRONMENT "${environment}")
endfunction()
