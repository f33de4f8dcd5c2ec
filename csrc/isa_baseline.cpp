#define OCTAVO_ISA baseline
#define OCTAVO_NAME "baseline"
#include "impl/table.h"

const octavo::Kernels& octavo::baseline_kernels() { return octavo::baseline::table; }
