# BITFALL_CUDA = ON, OFF or AUTO: sets BITFALL_CUDA_FOUND, BITFALL_CUDA_SUMMARY and, where found, the
# language CUDA and the targets CUDA::*.
#
# AUTO takes CUDA where a compiler works, host compiler included (nvcc refuses some), and cuBLASLt and
# CUB are there; never in builds with sanitizers, which know nothing of GPUs.

set(BITFALL_CUDA AUTO CACHE STRING "The CUDA backend: ON, OFF or AUTO")

# A run-time library of another build must not be taken for this one's: both carry this.
set(interface "")
foreach(header core/backend.h core/communicator.h core/quant_spec.h core/rng.h core/tensor.h core/update_decision.h
       csrc_cuda/plugin.h)
  file(SHA256 ${PROJECT_SOURCE_DIR}/${header} hash)
  string(APPEND interface ${hash})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${header})
endforeach()
string(SHA256 BITFALL_CUDA_INTERFACE "${interface}")

set(BITFALL_CUDA_FOUND FALSE)
if(BITFALL_CUDA STREQUAL "OFF")
  set(BITFALL_CUDA_SUMMARY "FALSE (switched off)")
elseif(BITFALL_CUDA STREQUAL "AUTO" AND BITFALL_SANITIZE)
  set(BITFALL_CUDA_SUMMARY "FALSE (sanitizers)")
else()
  # In the environment: check_language takes a compiler in a variable for one that works.
  if(NOT DEFINED ENV{CUDACXX})
    find_program(BITFALL_NVCC nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(BITFALL_NVCC)
      set(ENV{CUDACXX} ${BITFALL_NVCC})
    endif()
  endif()
  if(NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER AND CMAKE_CXX_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit 12)
    # CUDA 13 has it in a folder that nvcc alone knows.
    find_path(BITFALL_CUB_INCLUDE_DIR cub/device/device_radix_sort.cuh
              PATHS ${CUDAToolkit_INCLUDE_DIRS} PATH_SUFFIXES cccl NO_DEFAULT_PATH)
  endif()
  if(CMAKE_CUDA_COMPILER AND TARGET CUDA::cublasLt AND BITFALL_CUB_INCLUDE_DIR)
    set(BITFALL_CUDA_FOUND TRUE)
    set(BITFALL_CUDA_SUMMARY "TRUE (${CUDAToolkit_VERSION})")
  elseif(BITFALL_CUDA STREQUAL "ON")
    message(FATAL_ERROR "BITFALL_CUDA=ON needs CUDA 12 or newer: an nvcc that accepts the host "
                        "compiler (see above; CUDACXX and CUDAHOSTCXX name others), cuBLASLt and CUB")
  else()
    set(BITFALL_CUDA_SUMMARY "FALSE (no working nvcc with cuBLASLt and CUB found)")
  endif()
endif()
