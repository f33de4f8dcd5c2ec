#define OCTAVO_ISA avx512
#define OCTAVO_NAME "avx512"
#include "impl/table.h"

const octavo::Kernels& octavo::avx512_kernels() { return octavo::avx512::table; }
