#define OCTAVO_ISA neon_dotprod
#define OCTAVO_NAME "neon_dotprod"
#include "impl/table.h"

const octavo::Kernels& octavo::neon_dotprod_kernels() { return octavo::neon_dotprod::table; }
