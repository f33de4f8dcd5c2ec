#define OCTAVO_ISA avx2_vnni
#define OCTAVO_NAME "avx2_vnni"
#include "impl/table.h"

const octavo::Kernels& octavo::avx2_vnni_kernels() { return octavo::avx2_vnni::table; }
