# bitfall_kernels(TARGET a.cpp ...): compiles each source once per instruction set into TARGET.
#
# Each copy sees BITFALL_ISA (generic, avx2, avx512, avx512_bf16) as its namespace. -ffp-contract=off keeps elementwise
# results equal on all of them; -fno-math-errno and -fno-trapping-math let plain loops vectorise.
# Kernels are optimised in every build type: a debug build tests the code that ships.

set(BITFALL_ISAS generic avx2 avx512 avx512_bf16)
set(BITFALL_ISA_FLAGS_generic "")
set(BITFALL_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
# g++ 12 takes the undefined operand of its own AVX-512 intrinsics for an uninitialised variable; the generic and avx2
# copies of a kernel still warn.
set(BITFALL_ISA_FLAGS_avx512 -Wno-uninitialized ${BITFALL_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                             -mprefer-vector-width=512)
set(BITFALL_ISA_FLAGS_avx512_bf16 ${BITFALL_ISA_FLAGS_avx512} -mavx512bf16)

function(bitfall_kernels target)
  foreach(isa ${BITFALL_ISAS})
    set(object ${target}_kernels_${isa})
    add_library(${object} OBJECT ${ARGN})
    bitfall_target(${object})
    target_compile_definitions(${object} PRIVATE BITFALL_ISA=${isa})
    target_compile_options(${object} PRIVATE -O3 -fopenmp-simd -ffp-contract=off -fno-math-errno
                                             -fno-trapping-math ${BITFALL_ISA_FLAGS_${isa}})
    # One source, so one instrumented copy finds what sanitizers can find.
    if(BITFALL_SANITIZE AND NOT isa STREQUAL "generic")
      target_compile_options(${object} PRIVATE -fno-sanitize=all)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()
