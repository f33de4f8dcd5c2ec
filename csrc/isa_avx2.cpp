#define OCTAVO_ISA avx2
#define OCTAVO_NAME "avx2"
#include "impl/table.h"

const octavo::Kernels& octavo::avx2_kernels() { return octavo::avx2::table; }
