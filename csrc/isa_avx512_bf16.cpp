#define OCTAVO_ISA avx512_bf16
#define OCTAVO_NAME "avx512_bf16"
#include "impl/table.h"

const octavo::Kernels& octavo::avx512_bf16_kernels() { return octavo::avx512_bf16::table; }
