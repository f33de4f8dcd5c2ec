#define OCTAVO_ISA amx_bf16
#define OCTAVO_NAME "amx_bf16"
#include "impl/table.h"

const octavo::Kernels& octavo::amx_bf16_kernels() { return octavo::amx_bf16::table; }
