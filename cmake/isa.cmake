# Compiles csrc/cpu/isa.cpp once per instruction set, each with its own flags and in its own namespace: the kernel
# tables of the native module, and of the program that tests them without Python. Set PYFINETUNE_KERNEL_FLAGS before
# including this for another optimisation level. Leaves the objects in PYFINETUNE_ISA_OBJECTS.
find_package(OpenMP REQUIRED COMPONENTS CXX)
if(NOT DEFINED PYFINETUNE_KERNEL_FLAGS)
  set(PYFINETUNE_KERNEL_FLAGS -O3)
endif()

set(PYFINETUNE_ISA_OBJECTS)
function(pyfinetune_add_isa name)
  add_library(kernels_${name} OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/cpu/isa.cpp)
  target_compile_definitions(kernels_${name} PRIVATE PYFINETUNE_ISA=${name})
  # No contraction: a*b+c is two roundings unless a kernel writes fma. No math-errno, so that loops vectorise.
  target_compile_options(kernels_${name} PRIVATE ${PYFINETUNE_KERNEL_FLAGS}
                                                 -ffp-contract=off -fno-math-errno -fno-strict-aliasing
                                                 -fno-exceptions -fno-rtti -Wall -Wextra -Wno-unused-function -Wno-psabi
                                                 -Wno-uninitialized -Wno-maybe-uninitialized ${ARGN})
  target_link_libraries(kernels_${name} PRIVATE OpenMP::OpenMP_CXX)
  set(PYFINETUNE_ISA_OBJECTS ${PYFINETUNE_ISA_OBJECTS} $<TARGET_OBJECTS:kernels_${name}> PARENT_SCOPE)
endfunction()

pyfinetune_add_isa(scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(AVX2_FLAGS -mavx2 -mfma -mf16c)
  set(AVX512_FLAGS ${AVX2_FLAGS} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  pyfinetune_add_isa(avx2 ${AVX2_FLAGS})
  pyfinetune_add_isa(avx512 ${AVX512_FLAGS})
  pyfinetune_add_isa(avx512_bf16 ${AVX512_FLAGS} -mavx512bf16 -mavx512vbmi)
endif()
