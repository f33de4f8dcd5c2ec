#define OCTAVO_ISA avx512_vnni
#define OCTAVO_NAME "avx512_vnni"
#include "impl/table.h"

const octavo::Kernels& octavo::avx512_vnni_kernels() { return octavo::avx512_vnni::table; }
